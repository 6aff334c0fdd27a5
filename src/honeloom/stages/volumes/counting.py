"""What counting a stage gives, and the sums that all verbs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from honeloom.errors import HoneloomError
from honeloom.planning.volume import Lengths, Part, totals
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.runner import Job
from honeloom.stages.volumes.reading import Made, Pool, Shape
from honeloom.types.plans import Volume

__all__ = ["ADAPTER_BYTES", "ROW_BYTES", "Counted", "count", "rows_of", "tuned_size"]

ADAPTER_BYTES = 4
"""Of a weight of LoRA, which is fp32 on disk."""
ROW_BYTES = 16
"""Of a row in a compressed table of losses or scores, about; the text of selected rows stands beside it."""
_FULL_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Counted:
    """A stage's work, and what it will make.

    Attributes
    ----------
    volume : Volume
        The numbers.
    parts : tuple of Part
        Passes through models.
    shapes : mapping
        Models by their place.
    made : Made
        What later stages will find.
    result_bytes : int
        What stays on disk, without the report.
    loads : mapping
        Place of a model -> how often its weights are loaded.
    client_rounds : int
        Of a federation: rounds times the clients asked.
    inner : mapping
        Verb -> how often it runs inside this one.
    """

    volume: Volume
    parts: tuple[Part, ...] = ()
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    made: Made = field(default_factory=Made)
    result_bytes: int = 0
    loads: Mapping[str, int] = field(default_factory=dict)
    client_rounds: int = 0
    inner: Mapping[str, int] = field(default_factory=dict)


def rows_of(job: Job, field_name: str) -> tuple[ResolvedInput, ...]:
    """Every input of a rows field."""
    return tuple(i for p, i in job.inputs.items() if p.startswith(f"{field_name}."))


def tuned_size(shape: Shape, method: str, rank: int, dtype: str) -> tuple[int, Made]:
    """Bytes of what a tuning writes, and the model that it stands for."""
    try:
        decoder = shape.decoder
    except HoneloomError:  # a family without known sizes
        return 0, Made(shape=replace(shape, predicted=True))
    if method == "full":
        size = decoder.parameters * _FULL_BYTES.get(dtype, 4)
        return size, Made(shape=replace(shape, size=size, kind="model", predicted=True))
    size = rank * decoder.adapter_widths * ADAPTER_BYTES
    return size, Made(shape=replace(shape, size=size, kind="adapter", predicted=True))


def count(
    parts: Sequence[Part],
    pools: Sequence[Pool],
    lengths: Sequence[Lengths],
    shapes: Mapping[str, Shape],
    *,
    read: int = 0,
    written: int = 0,
    evaluations: int = 0,
    at_most: bool = False,
    notes: tuple[str, ...] = (),
) -> Volume:
    """The numbers of a stage's parts together."""
    known = [one for one in lengths if one.rows]
    forward, gradients, steps = totals(parts)
    return Volume(
        rows=sum(p.count for p in pools), tokens=sum(one.total for one in lengths), forward_tokens=forward,
        train_tokens=gradients, steps=steps, evaluations=evaluations, bytes_read=read, bytes_written=written,
        predicted=any(p.predicted for p in pools),
        counted=bool(known) and all(one.counted for one in known), at_most=at_most, notes=notes,
    )  # fmt: skip
