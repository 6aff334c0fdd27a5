"""Profile zero: output projections become 0, so the stock model computes the dropped one; nothing is saved."""

from __future__ import annotations

from typing import get_args

from honeloom.checkpoint.architectures import output_tensors, tensor_shapes
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.dropping.export.halves import Half, Source
from honeloom.dropping.export.plan import ExportPlan
from honeloom.errors import CheckpointError

__all__ = ["export"]


def export(source: Source) -> ExportPlan:
    """Keep every tensor, and put zeros where a dropped half writes to the stream.

    Raises
    ------
    CheckpointError
        A half has no tensors that could become 0, or the source lacks tensors whose shapes are not known.
    """
    zeros = {name for half in get_args(Half) for layer in source.gone(half) for name in _silencing(source, half, layer)}
    tensors = [
        ExportTensor(name, None if name in zeros else name, info.shape, info.dtype)
        for name in source.names()
        for info in (source.checkpoint.info(name),)
    ]
    return ExportPlan(
        profile="zero",
        tensors=(*tensors, *_restored(source)),
        config=source.config,
        blocks=tuple((i, i) for i in range(source.layers)),
        saves=(),
        loads_in=("transformers", f"whatever loads {source.config.get('model_type')} models"),
    )


def _silencing(source: Source, half: Half, layer: int) -> list[str]:
    """Tensors of a half that must be 0: its output projection, else, in an unlisted family, all that it has."""
    if (half, layer) in source.absent:
        return []
    layout = source.layout
    if layout.listed:
        return output_tensors(layout.listed, source.names(), layer, half)
    modules = layout.attention if half == "attention" else layout.mlp
    places = {name: layout.half_of(name) for name in source.names()}
    found = [n for n, p in places.items() if p and p[:2] == (layer, half) and p[2].split(".")[0] in modules]
    if not found:
        raise CheckpointError(f"{source.checkpoint.folder}: no tensor of layer {layer} is known to be its {half}'s")
    return found


def _restored(source: Source) -> list[ExportTensor]:
    """Halves that an already dropped source lacks, all of them 0."""
    if not source.absent:
        return []
    held, shapes = set(source.names()), tensor_shapes(source.config)
    dtype = source.checkpoint.info(source.names()[0]).dtype
    return [ExportTensor(name, None, shape, dtype) for name, shape in shapes.items() if name not in held]
