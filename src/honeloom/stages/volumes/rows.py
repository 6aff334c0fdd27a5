"""How much work the verbs are that pass rows through one model: evaluate, select, tune, federate."""

from __future__ import annotations

import math

from honeloom.evaluation.config import EvaluateConfig
from honeloom.federated.federate_config import FederateConfig
from honeloom.planning.volume import Lengths, score, train
from honeloom.runs.processes import world_size
from honeloom.selection.config import SelectConfig
from honeloom.selection.sizes import rows_to_keep
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.runner import Job
from honeloom.stages.volumes.counting import ROW_BYTES, Counted, count, rows_of, tuned_size
from honeloom.stages.volumes.reading import Made, PlanReader, Pool
from honeloom.stages.volumes.selection import selection_parts
from honeloom.tuning.config import TuneConfig

__all__ = ["count_evaluate", "count_federate", "count_select", "count_tune"]

CLIENT_ROWS = 16
"""Rows of a client on which its loss is measured, before and after."""
CURVATURE_PASSES = 200
"""Forward passes by which mezo's rate is measured, as its note says."""


def count_evaluate(job: Job, reader: PlanReader) -> Counted:
    """One pass of the rows, and one with another model where that has to be run."""
    config = job.config
    assert isinstance(config, EvaluateConfig)  # by the verb
    shape = reader.shape(job.inputs["model"])
    shapes, parts, loads = {"model": shape}, [], {"model": 1}
    pool, lengths = Pool(0, 0), Lengths(0)
    if config.rows:
        pool = reader.pool(rows_of(job, "rows"), config, dedup=False)
        lengths = reader.lengths(pool, shape, config.max_length)
        parts.append(score("score rows", lengths, batch=config.batch_size))
    other = job.inputs.get("against")
    if other is not None and config.rows and _is_model(other, reader):
        shapes["against"], loads["against"] = reader.shape(other), 1
        lengths_there = reader.lengths(pool, shapes["against"], config.max_length)
        parts.append(score("score rows with the other model", lengths_there, batch=config.batch_size, model="against"))
    notes = (f"lm-eval tasks {', '.join(config.tasks)} are not counted",) if config.tasks else ()
    read = sum(s.size for s in shapes.values())
    volume = count(parts, (pool,), (lengths,), shapes, read=read, notes=notes)
    return Counted(volume, tuple(parts), shapes, result_bytes=ROW_BYTES * pool.count, loads=loads)


def _is_model(found: ResolvedInput, reader: PlanReader) -> bool:
    """Whether a comparison is with a model, which has to run, or with an evaluation that is there."""
    if found.paths:
        return not (found.paths[0] / "examples.parquet").is_file()
    made = reader.made_at(found.value)
    return made is None or made.shape is not None


def count_select(job: Job, reader: PlanReader) -> Counted:
    """What the method does, and how many rows are kept."""
    config = job.config
    assert isinstance(config, SelectConfig)  # by the verb
    pool = reader.pool(rows_of(job, "rows"), config, near_duplicates=config.near_duplicates)
    target = reader.pool(rows_of(job, "target"), config, whole=True) if config.target else None
    shape = reader.shape(job.inputs["model"]) if "model" in job.inputs else None
    lengths = reader.lengths(pool, shape, config.max_length) if shape else Lengths(pool.count)
    aims = reader.lengths(target, shape, config.max_length) if target and shape else Lengths(0)
    kept = _kept(config, pool, lengths)
    work = selection_parts(config, lengths, aims if target else None, kept, pool.table)
    made = Pool(kept, round(pool.size * kept / max(1, pool.count)), pool.table, predicted=True)
    shapes = {"model": shape} if shape else {}
    volume = count(
        work.parts, (pool, *([target] if target else ())), (lengths, aims), shapes,
        read=shape.size if shape else 0, evaluations=work.evaluations, at_most=work.at_most, notes=work.notes,
    )  # fmt: skip
    return Counted(
        volume, tuple(work.parts), shapes, Made(pool=made), made.size + 2 * ROW_BYTES * pool.count,
        {"model": work.loads} if shape else {},
    )  # fmt: skip


def _kept(config: SelectConfig, pool: Pool, lengths: Lengths) -> int:
    amount, unit = config.keep_amount()
    if unit == "tokens":
        return min(pool.count, max(1, int(float(amount) / max(1.0, lengths.tokens))))
    return rows_to_keep(amount, unit, pool.count)


def count_tune(job: Job, reader: PlanReader) -> Counted:
    """The steps."""
    config = job.config
    assert isinstance(config, TuneConfig)  # by the verb
    shape = reader.shape(job.inputs["model"])
    pool = reader.pool(rows_of(job, "rows"), config)
    lengths = reader.lengths(pool, shape, config.max_length)
    per_step = config.batch_size * config.accumulate * world_size()
    if config.max_steps is not None:
        steps, rows = config.max_steps, config.max_steps * per_step
    else:
        rows = max(1, round(lengths.rows * (config.epochs or 1.0)))
        steps = math.ceil(rows / per_step)
    tuning = {
        "method": config.method.model_dump(), "optimizer": config.optimizer.model_dump(), "packing": config.packing,
        "accumulate": config.accumulate, "gradient_checkpointing": config.gradient_checkpointing,
        "group_by_length": config.group_by_length,
    }  # fmt: skip
    parts = [train("train", lengths, steps=steps, batch=config.batch_size, rows=rows, tuning=tuning, loop="trainer")]
    if config.lr == "auto" or getattr(config.optimizer, "mu", None) == "auto":
        times = CURVATURE_PASSES * config.batch_size / max(1, lengths.rows)
        parts.append(score("measure the curvature", lengths, batch=config.batch_size, times=times, rendered=0))
    size, made = tuned_size(shape, config.method.type, getattr(config.method, "rank", 0), config.dtype)
    volume = count(parts, (pool,), (lengths,), {"model": shape}, read=shape.size, written=size)
    return Counted(volume, tuple(parts), {"model": shape}, made, size + ROW_BYTES * pool.count, {"model": 2})


def count_federate(job: Job, reader: PlanReader) -> Counted:
    """Rounds, the clients that each asks, their steps, and their losses before and after."""
    config = job.config
    assert isinstance(config, FederateConfig)  # by the verb
    shape = reader.shape(job.inputs["model"])
    if config.engine == "deployment":
        note = "rows stay with their nodes, so passes and seconds cannot be counted here"
        return Counted(count((), (), (), {"model": shape}, read=shape.size, notes=(note,)), shapes={"model": shape})
    pools = _client_pools(job, config, reader)
    lengths = reader.lengths(max(pools, key=lambda p: p.count), shape, config.max_length).take(
        sum(p.count for p in pools)
    )
    asked = [
        max(1, math.ceil(config.participation * sum(c.takes_part(n) for c in config.members()) - 1e-9))
        for n in range(1, config.rounds + 1)
    ]
    times = sum(asked)
    tuning = {"method": {"type": config.method}, "optimizer": config.optimizer.model_dump()}
    if config.method == "lora":
        tuning["method"] |= {"rank": max(c.largest_rank for c in config.members())}
    parts = [train("train clients", lengths, steps=times * config.local_steps, batch=config.batch_size, tuning=tuning,
                   alone=True)]  # fmt: skip
    told = 0 if config.privacy.dp is not None else 2 * times
    if told:
        mine = lengths.take(min(CLIENT_ROWS, max(1, lengths.rows // len(config.members()))))
        parts.append(score("measure clients", mine, batch=config.batch_size, times=told, alone=True,
                           rank=max(c.largest_rank for c in config.members())))  # fmt: skip
    rank = max(c.largest_rank for c in config.members())
    rank *= len(config.members()) * config.rounds if config.aggregation.type == "flora" else 1
    size, made = tuned_size(shape, config.method, rank, config.dtype)
    volume = count(parts, pools, (lengths,), {"model": shape}, read=shape.size, written=size, evaluations=told)
    stays = size + ROW_BYTES * lengths.rows
    return Counted(volume, tuple(parts), {"model": shape}, made, stays, {"model": 2}, client_rounds=times)


def _client_pools(job: Job, config: FederateConfig, reader: PlanReader) -> list[Pool]:
    if config.partition is not None:
        return [reader.pool(rows_of(job, "rows"), config)]
    return [reader.pool(rows_of(job, f"clients.{k}.rows"), config) for k in range(len(config.clients))]
