"""`drop`: score every sub-layer in one pass, plan, write, reload and compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.compare import logits_gap, probe_ids
from honeloom.backends.hf.importance import score_units
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.backends.hf.sublayers import silenced
from honeloom.checkpoint.architectures import Architecture, architecture_of, output_tensors
from honeloom.checkpoint.dtypes import torch_dtype
from honeloom.checkpoint.folders import copy_config, copy_tokenizer, refuse_quantised
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream, write_checkpoint
from honeloom.dropping.config import DropConfig
from honeloom.dropping.cost import cache_shape, kv_bytes_per_token, matrix_parameters
from honeloom.dropping.plan import choose_drops
from honeloom.dropping.scores import KINDS, UnitScores
from honeloom.errors import ConfigError, RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.runs.atomic import require_space, write_json
from honeloom.stages.row_records import CALIBRATION_FILE, write_table
from honeloom.stages.rows import scan
from honeloom.stages.work import Outcome, Work
from honeloom.types.plans import DropPlan
from honeloom.types.report import Check, Metric

__all__ = ["execute"]

CHUNK = 1 << 22


def execute(work: Work[DropConfig]) -> Outcome:
    """Run a drop."""
    config, found = work.config, work.inputs["model"]
    if found.base is not None:
        raise ConfigError(f"{found.value} is an adapter; merge it into its base first, then drop layers of the result")
    source = found.paths[0]
    refuse_quantised(source, "drop")
    model = load_model(source, loading=Loading.of(config))
    with Checkpoint.open(source) as checkpoint:
        architecture = architecture_of(checkpoint.config, checkpoint.names())
        scores = _score(work, model, architecture, _calibration(work, model))
        plan = _plan(config, scores)
        write_json(work.dir / "scores.json", {kind: scores.to_json()[kind] for kind in KINDS})
        write_json(work.dir / "drop_plan.json", plan.to_json())
        work.log.say(f"drop: attention {list(plan.attention)}, mlp {list(plan.mlp)}, blocks {list(plan.block)}")
        zeroed = _write_zero(checkpoint, architecture, plan, work.dir)
        copy_config(source, work.dir)
        copy_tokenizer(source, work.dir)
        details = _costs(checkpoint, model, architecture)
    checks = _verify(work, model, plan)
    details |= {"plan": plan.to_json(), "zeroed": zeroed, "loads_in": ["transformers"]}
    return Outcome("model", ".", _metrics(scores), checks, details, relation="finetune")


def _calibration(work: Work[DropConfig], model: Any) -> list[Encoded]:
    """Encode the calibration rows: a seeded sample of at most `samples`, longest first."""
    tokenizer = load_tokenizer(work.model())
    if tokenizer is None:
        work.log.warn(
            "the model has no tokenizer: layers are scored on seeded token ids, which say little of real text"
        )
        ids = probe_ids(None, model.config, work.config.seed)
        return [
            Encoded(ids=tuple(row), scored=(False,) * len(row), chars=0, truncated=False, ends=False) for row in ids
        ]
    config, rows = work.config, scan(work, field="calibration")
    draws = keyed_uniform(config.seed, "drop/calibration", rows.ids)
    chosen = sorted(range(len(rows)), key=lambda i: (draws[i], rows.ids[i]))[: config.samples]
    encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, config.max_length))
    used: dict[str, Encoded] = {}
    for row in rows.take(chosen):
        try:
            used[row.id] = encoder.encode_choices(row)[row.answer] if row.kind == "choice" else encoder.encode(row)
        except UnrenderableRow as error:
            work.log.event("skipped", row=row.id, reason=str(error))
    if not used:
        raise RowsError("no calibration row could be rendered; look at them with `honeloom rows preview`")
    write_table(work.dir / CALIBRATION_FILE, {"id": list(used)})
    return sorted(used.values(), key=lambda e: -len(e.ids))


def _score(work: Work[DropConfig], model: Any, architecture: Architecture, encoded: Sequence[Encoded]) -> UnitScores:
    """Importance of attention, MLP and block of every layer, in one pass over the rows."""
    size = work.config.batch_size
    starts = work.log.track(range(0, len(encoded), size), "score layers", -(-len(encoded) // size))
    batches = (encoded[start : start + size] for start in starts)
    return score_units(model, architecture, batches, [work.config.metric])[work.config.metric.type]


def _plan(config: DropConfig, scores: UnitScores) -> DropPlan:
    counts = {"attention": config.attention, "mlp": config.mlp, "block": config.block}
    attention, mlp, block = ([s.value for s in scores.of(kind) if s] for kind in KINDS)
    return choose_drops(attention, mlp, block, counts=counts, metric=config.metric.type, profile=config.profile)


def _write_zero(checkpoint: Checkpoint, architecture: Architecture, plan: DropPlan, folder: Path) -> list[str]:
    """Copy the checkpoint with the output projections of dropped sub-layers set to zero; returns their names."""
    names = checkpoint.names()
    zeroed = [n for layer in plan.dropped_attention() for n in output_tensors(architecture, names, layer, "attention")]
    zeroed += [n for layer in plan.dropped_mlp() for n in output_tensors(architecture, names, layer, "mlp")]
    require_space(folder, sum(checkpoint.info(n).end - checkpoint.info(n).start for n in names))
    write_checkpoint(folder, [_stream(checkpoint, name, name in zeroed) for name in names])
    return zeroed


def _stream(checkpoint: Checkpoint, name: str, zero: bool) -> TensorStream:
    info = checkpoint.info(name)

    def chunks() -> Iterator[torch.Tensor]:
        for start in range(0, info.elements, CHUNK):
            piece = checkpoint.read_slice(name, start, min(info.elements, start + CHUNK))
            yield torch.zeros_like(piece) if zero else piece

    return TensorStream(name, torch_dtype(info.dtype), info.shape, chunks)


def _costs(checkpoint: Checkpoint, model: Any, architecture: Architecture) -> dict[str, Any]:
    """Parameters, cache bytes and matrix FLOPs per token; the zero profile keeps them all."""
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    config = model.config.get_text_config()
    cache = cache_shape(config.to_dict())
    matrices = matrix_parameters(
        {i.name: i.shape for i in infos},
        embedding=architecture.embeddings.rsplit(".", 1)[-1],
        tied=bool(model.config.tie_word_embeddings),
        experts=getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1,
        active=getattr(config, "num_experts_per_tok", None) or 1,
    )
    same = {
        "params": sum(i.elements for i in infos),
        "kv_bytes_per_token": kv_bytes_per_token(cache, cache.layers, torch_dtype(infos[0].dtype).itemsize),
        "flops_per_token": round(2 * matrices),
    }
    return {name: {"before": value, "after": value} for name, value in same.items()}


def _verify(work: Work[DropConfig], model: Any, plan: DropPlan) -> tuple[Check, ...]:
    """The written model, loaded plainly, against the source with the dropped sub-layers silenced."""
    tokenizer = load_tokenizer(work.model())
    ids = probe_ids(tokenizer, model.config, work.config.seed)
    probe = "two sentences" if tokenizer else "seeded token ids (no tokenizer)"
    again = load_model(work.dir, loading=Loading.of(work.config))
    with silenced(model, attention=plan.dropped_attention(), mlp=plan.dropped_mlp()):
        gap = logits_gap(model, again, ids)
    claim = f"plain transformers gives the dropped model's logits on {probe} (largest difference)"
    return (Check(claim, gap, 1e-4, gap <= 1e-4),)


def _metrics(scores: UnitScores) -> tuple[Metric, ...]:
    return tuple(
        Metric("importance", s.value, scores.rows, "1 - cosine", True, s.stderr, f"{kind}.{i}")
        for kind in KINDS
        for i, s in enumerate(scores.of(kind))
        if s
    )
