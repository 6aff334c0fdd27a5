"""One chunk of a merged tensor in its output type, with what must be known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.dtypes import format_name
from honeloom.merging.engine.operands import KINDS, Operands, kernels, operands
from honeloom.merging.engine.tensors import BLOCK, Bytes, Kept, Merged, Read, SparseSum, Tensors, WeightedSum
from honeloom.ops.noise import stream_key
from honeloom.ops.rounding import round_once

__all__ = ["Chunk", "merge_chunk"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements of a result.

    Attributes
    ----------
    values : Tensor
        (n,), of the output type.
    lost : int
        How many the merge moves away from the base and the output type rounds back to it; 0 without a base.
    damaged : (int, int) or None
        Model (K: the base) and index of the first input element that is NaN or infinite, as far as nothing else has
        refused it before.
    beyond : int or None
        Index of the first element of the result that is NaN or infinite.
    """

    values: torch.Tensor
    lost: int = 0
    damaged: tuple[int, int] | None = None
    beyond: int | None = None


def merge_chunk(merged: Merged, tensors: Tensors, start: int, stop: int, dtype: torch.dtype) -> Chunk:
    """Compute elements start..stop of a result and round them once.

    Parameters
    ----------
    merged : Merged
        Sums go to compiled kernels, anything else block by block through torch; both give the same bits.
    tensors : Tensors
        What is merged.
    start, stop : int
        Range of the flattened tensor.
    dtype : torch.dtype
        Of the output: float64, float32, bfloat16 or float16.

    Returns
    -------
    Chunk
        NaN and infinity are reported and not refused; every NaN is the same quiet NaN.
    """
    values = torch.empty(stop - start, dtype=dtype)
    if not isinstance(merged, WeightedSum | SparseSum):
        return _by_torch(merged, tensors.base, values, start)
    out: npt.NDArray[np.uint8] = values.view(torch.uint8).numpy()
    kind, lost, damaged, beyond = KINDS[format_name(dtype)], 0, None, None
    for first, part in operands(merged.tensors, start, stop, _base(merged)):
        begin = (first - start) * dtype.itemsize
        room = out[begin : begin + part.count * dtype.itemsize]
        model, place, wrong, fewer = _run(merged, part, first, room, kind)
        lost += fewer
        if damaged is None and model >= 0:
            damaged = (model, first + place)
        if beyond is None and wrong >= 0:
            beyond = first + wrong
    return Chunk(values, lost, damaged, beyond)


def _base(merged: WeightedSum | SparseSum) -> Read | None:
    needed = isinstance(merged, SparseSum) or merged.from_base
    return merged.tensors.origin if needed else merged.tensors.base


def _run(
    merged: WeightedSum | SparseSum, part: Operands, first: int, out: Bytes, kind: int
) -> tuple[int, int, int, int]:
    """Call the kernel; its answer."""
    _check(merged)
    if isinstance(merged, WeightedSum):
        factors = np.array(merged.factors, np.float64)
        found = kernels("kernels").weighted_sum(*part.arguments, factors, merged.from_base, out, kind)
    else:
        found = kernels("kernels").sparse_sum(
            *part.arguments,
            first,
            np.array([_cut_bits(kept) for kept in merged.kept], np.int64),
            np.array([math.ceil(kept.probability * 2.0**53) for kept in merged.kept], np.int64),
            np.array([stream_key("uniform", merged.tensors.seed, kept.stream) for kept in merged.kept], np.int64),
            np.array([kept.factor for kept in merged.kept], np.float64),
            np.array(merged.weights, np.float64),
            merged.scale,
            merged.elect,
            merged.normalize,
            merged.total,
            out,
            kind,
        )
    model, place, wrong, lost = map(int, found)
    return model, place, wrong, lost


def _check(merged: WeightedSum | SparseSum) -> None:
    """The kernels take lengths on trust."""
    models = len(merged.tensors.models)
    lists = (merged.factors,) if isinstance(merged, WeightedSum) else (merged.kept, merged.weights)
    wrong = [len(values) for values in lists if len(values) != models]
    if wrong:
        raise ValueError(f"{wrong[0]} settings for {models} models; one for each is needed")


def _cut_bits(kept: Kept) -> tuple[int, int, int, int]:
    low = (-1, -1) if kept.low is None else (_bits(kept.low.value), kept.low.last)
    high = ((1 << 63) - 1, -1) if kept.high is None else (_bits(kept.high.value), kept.high.last)
    return *low, *high


def _bits(value: float) -> int:
    """Of a float64, as an integer: in the order of the sizes, and of the value -1 below them all."""
    return int(np.float64(value).view(np.int64))


def _by_torch(merged: Merged, base: Read | None, out: torch.Tensor, start: int) -> Chunk:
    """Any other plan, through its own call."""
    lost, beyond = 0, None
    for first in range(0, len(out), BLOCK):
        piece = out[first : first + BLOCK]
        begin, end = start + first, start + first + len(piece)
        exact = merged(begin, end)
        piece.copy_(round_once(exact, out.dtype))
        wrong = ~torch.isfinite(piece)
        if bool(wrong.any()):
            beyond = begin + int(wrong.nonzero()[0]) if beyond is None else beyond
            piece[piece.isnan()] = math.nan
        if base is not None:
            origin = base(begin, end)
            lost += int(((exact != origin) & (piece == round_once(origin, out.dtype))).sum())
    return Chunk(out, lost, None, beyond)
