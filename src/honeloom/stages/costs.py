"""What a plan's stages cost: work that is counted, memory, disk, downloads, and where asked for seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from honeloom.errors import CheckpointError, HoneloomError
from honeloom.planning.memory import CUDA_CONTEXT, Work, peak_memory
from honeloom.planning.timing import Timing
from honeloom.planning.volume import Part
from honeloom.registry import load_target
from honeloom.runs.log import Console, QuietConsole
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.needs import on_gpu
from honeloom.stages.runner import Job
from honeloom.stages.volumes import Counted, volume_of
from honeloom.stages.volumes.reading import PlanReader, Shape, estimate_tokens
from honeloom.types.plans import PlannedCost, StagePlan, Volume

__all__ = ["Entry", "with_costs"]

SAMPLE = 200
"""Rows that are made to tokens where nothing is calibrated."""
PAGE_BYTES = 4_900_000
"""Of a report's page, which holds the script of its charts; without extra `report` there is none."""
SIDE_BYTES = 40_000
"""Of the other files beside a result."""
FLOOR = {"torch": 530 << 20, "train": 165 << 20, "numba": 80 << 20}
"""Resident bytes of the libraries, measured: torch and transformers, what training adds, what merging adds."""
_TRAIN = ("tune", "federate")
_MERGE = ("merge", "mix", "glue", "aggregate", "extract-lora")


@dataclass(frozen=True, slots=True)
class Entry:
    """A stage of a plan, and the path that its result will have."""

    job: Job
    plan: StagePlan
    folder: str = ""


def with_costs(entries: Sequence[Entry], *, calibrate: bool = False, console: Console | None = None) -> list[StagePlan]:
    """Add volume and cost to plans, in order: a stage reads what those before it will make.

    Parameters
    ----------
    entries : sequence of Entry
        Stages that are finished already cost nothing.
    calibrate : bool
        Whether to time trials and passes, which imports torch.
    console : Console, optional
        For the progress of that.

    Raises
    ------
    ConfigError
        Something cannot be timed: a model that is not here, or quantised weights.
    """
    timing = _Calibrated(entries, console or QuietConsole()) if calibrate else None
    count, most = (timing.count, timing.most_rows) if timing else (estimate_tokens, SAMPLE)
    reader = PlanReader(count, most, exact=calibrate)
    plans, peak = [], 0
    for place, entry in enumerate(entries):
        if entry.plan.state == "reuse":
            plans.append(replace(entry.plan, volume=Volume(counted=True), cost=PlannedCost(memory_bytes=peak or None)))
            continue
        counted = _count(entry, reader)
        floor = timing.memory[place] if timing else _floor([e.job for e in entries[: place + 1]])
        cost = _cost(entry.job, counted, floor)
        if not on_gpu(entry.job.config):  # a process's peak is that of all stages so far
            peak = max(peak, floor, cost.memory_bytes or 0)
            cost = replace(cost, memory_bytes=peak)
        if timing:
            cost = timing.timed(entry.job, counted, cost)
        plans.append(_joined(entry.plan, counted, cost, timing is not None))
    return plans


def _count(entry: Entry, reader: PlanReader) -> Counted:
    try:
        counted = volume_of(entry.job, reader)
    except HoneloomError as error:
        return Counted(Volume(unknown=str(error)))
    if entry.folder:
        reader.will_make(entry.folder, counted.made)
    return counted


def _joined(plan: StagePlan, counted: Counted, cost: PlannedCost, calibrated: bool) -> StagePlan:
    """The plan with both; a tuning's needs tell tokens, steps and seconds of its training alone."""
    needs = plan.needs
    if calibrated and needs is not None and plan.verb == "tune" and not needs.unknown:
        steps = next(p for p in counted.parts if p.kind == "train")
        needs = replace(needs, tokens=steps.tokens, steps=steps.steps, seconds=cost.parts.get(steps.what))
    return replace(plan, needs=needs, volume=counted.volume, cost=cost)


class _Calibrated:
    """Seconds of stages; trials are made first, for they time imports."""

    def __init__(self, entries: Sequence[Entry], console: Console) -> None:
        check = load_target("honeloom.stages.calibrate:require_timeable")
        stages = [e for e in entries if e.plan.state != "reuse"]
        for entry in stages:
            check(entry.job)
            needs = entry.plan.needs
            if needs is not None and needs.unknown:
                raise _unknown(needs.unknown)
        self._calibration = load_target("honeloom.stages.calibrate:Calibration")(console)
        memory = {id(e): self._calibration.try_out(e.job) for e in stages}
        self.memory = [memory.get(id(e), 0) for e in entries]
        self.count = self._calibration.count
        self.most_rows: int = load_target("honeloom.stages.calibrate:MOST_ROWS")

    def timed(self, job: Job, counted: Counted, cost: PlannedCost) -> PlannedCost:
        """The cost with seconds; where a stage cannot be counted there are none."""
        if counted.volume.unknown:
            return cost
        parts: Mapping[str, Timing]
        parts, total = self._calibration.seconds(job, counted)
        seconds = {name: round(t.seconds, 3) for name, t in parts.items()}
        return replace(cost, seconds=round(total.seconds, 3), cpu_seconds=round(total.cpu, 3), parts=seconds)


def _unknown(reason: str) -> HoneloomError:
    error: type[HoneloomError] = load_target("honeloom.errors:ConfigError")
    return error(f"--calibrate needs a known model: {reason}")


def _cost(job: Job, counted: Counted, floor: int) -> PlannedCost:
    page = PAGE_BYTES if importlib.util.find_spec("plotly") else 0
    tokenizers = max((_tokenizer_bytes(s) for s in counted.shapes.values()), default=0)
    artefact = tokenizers if job.verb.name not in ("select", "evaluate") else 0
    return PlannedCost(
        memory_bytes=_memory(job, counted, floor),
        disk_bytes=counted.result_bytes + artefact + page + SIDE_BYTES,
        download_bytes=_download([i for i in job.inputs.values() if i.missing]),
    )


def _tokenizer_bytes(shape: Shape) -> int:
    file = shape.tokenizer / "tokenizer.json" if shape.tokenizer else None
    return file.stat().st_size if file is not None and file.is_file() else 0


def _download(missing: Sequence[ResolvedInput]) -> int | None:
    """Bytes of models that are not here, as far as their sizes follow from their configurations."""
    total = 0
    for found in missing:
        if found.kind != "model":
            return None
        try:
            total += PlanReader(estimate_tokens, 1).shape(found).size
        except HoneloomError:  # gated, or no connection
            return None
    return total


def _floor(jobs: Sequence[Job]) -> int:
    """Resident bytes of the libraries that these stages load, one after another in one process."""
    trains = any(j.verb.name in _TRAIN or _tunes(j.config) for j in jobs)
    merges = any(j.verb.name in _MERGE for j in jobs)
    return FLOOR["torch"] + FLOOR["train"] * trains + FLOOR["numba"] * merges


def _tunes(config: Any) -> bool:
    tunes = getattr(getattr(config, "method", None), "tunes", None)
    return bool(getattr(config, "heal", ())) or bool(tunes and tunes())


def _memory(job: Job, counted: Counted, floor: int) -> int:
    """Peak bytes: of the process with its libraries, or of the GPU."""
    gpu = on_gpu(job.config)
    needs = [_part_bytes(part, counted.shapes[part.model], job.config, gpu=gpu) for part in counted.parts]
    if counted.volume.bytes_written and job.verb.name in _MERGE:
        needs.append(_merge_bytes(counted))
    return max(needs, default=0) + (CUDA_CONTEXT if gpu else floor)


def _merge_bytes(counted: Counted) -> int:
    """The largest tensor of every model in fp32, for each of some threads, and of the result."""
    try:
        largest = max(s.decoder.largest for s in counted.shapes.values())
    except (CheckpointError, ValueError):  # a family without known sizes
        return 0
    return 4 * largest * (len(counted.shapes) + 1)


def _part_bytes(part: Part, shape: Shape, config: Any, *, gpu: bool) -> int:
    """Of a pass or a step with the longest rows that were seen."""
    work = Work(
        "inference", part.batch, part.lengths.longest,
        dtype=config.dtype if config.dtype != "auto" else "bf16" if gpu else "fp32",
        load_in=getattr(config, "load_in", None), host=not gpu, eager=getattr(config, "attn", None) == "eager",
    )  # fmt: skip
    if part.kind != "score":
        method = part.tuning.get("method") or {}
        work = replace(
            work, mode="zeroth-order" if part.directions else method.get("type", "lora"),
            rank=method.get("rank", 8), accumulate=part.tuning.get("accumulate", 1),
            checkpointing=bool(part.tuning.get("gradient_checkpointing")),
            states=0 if part.directions or part.kind == "backward" else 2,
        )  # fmt: skip
    try:
        return peak_memory(shape.decoder, work).total
    except CheckpointError:  # a family without known sizes
        return 0
