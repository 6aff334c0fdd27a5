"""One chunk of a merged tensor in its output type, with what must be known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.dtypes import format_name
from honeloom.merging.engine.operands import KINDS, Operands, kernels, operands
from honeloom.merging.engine.tensors import BLOCK, Kept, Merged, Read, SparseSum, Tensors, WeightedSum
from honeloom.ops.noise import stream_key
from honeloom.ops.rounding import round_once

__all__ = ["Chunk", "merge_chunk", "prepared_chunk"]


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


def merge_chunk(
    merged: Merged, tensors: Tensors, start: int, stop: int, dtype: torch.dtype, out: torch.Tensor | None = None,
    *, counted: bool = True,
) -> Chunk:  # fmt: skip
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
    out : Tensor, optional
        (stop - start,), contiguous and on the CPU, of any floating type: gets the rounded values, and is the chunk's.
    counted : bool
        Count what the rounding loses.

    Returns
    -------
    Chunk
        NaN and infinity are reported and not refused; every NaN is the same quiet NaN.
    """
    return prepared_chunk(merged, tensors, start, stop, dtype, out, counted=counted)()


def prepared_chunk(
    merged: Merged, tensors: Tensors, start: int, stop: int, dtype: torch.dtype, out: torch.Tensor | None = None,
    *, counted: bool = True,
) -> Callable[[], Chunk]:  # fmt: skip
    """`merge_chunk`, to be called once when all is ready: many chunks in a row keep the caches for the numbers.

    The stored bytes that `tensors` gives must stay as they are until then.
    """
    held = dtype if out is None else out.dtype
    summed = isinstance(merged, WeightedSum | SparseSum)
    if out is not None and held != dtype and not (summed and held == torch.float32 and dtype.itemsize == 2):
        return partial(_copied, prepared_chunk(merged, tensors, start, stop, dtype, counted=counted), out)
    values = torch.empty(stop - start, dtype=dtype) if out is None else out
    if not isinstance(merged, WeightedSum | SparseSum):
        return partial(_by_torch, merged, tensors.base if counted else None, values, start)
    _check(merged)
    calls = _calls(merged, values, start, stop, dtype, counted)
    return partial(_summed, values, next(calls, None), calls)


def _copied(run: Callable[[], Chunk], out: torch.Tensor) -> Chunk:
    """In another type."""
    chunk = run()
    return replace(chunk, values=out.copy_(chunk.values))


@dataclass(frozen=True, slots=True)
class _Call:
    """A kernel and its arguments, addresses among them, hence the operands."""

    first: int
    part: Operands
    kernel: Callable[..., tuple[int, int, int, int]]
    arguments: tuple[Any, ...]


def _summed(values: torch.Tensor, ready: _Call | None, calls: Iterator[_Call]) -> Chunk:
    lost, damaged, beyond = 0, None, None
    for call in chain((ready,) if ready else (), calls):
        model, place, wrong, fewer = map(int, call.kernel(*call.arguments))
        lost += fewer
        if damaged is None and model >= 0:
            damaged = (model, call.first + place)
        if beyond is None and wrong >= 0:
            beyond = call.first + wrong
    return Chunk(values, lost, damaged, beyond)


def _calls(
    merged: WeightedSum | SparseSum, values: torch.Tensor, start: int, stop: int, dtype: torch.dtype, counted: bool
) -> Iterator[_Call]:
    """What computes the values, part by part."""
    data: npt.NDArray[np.uint8] = values.view(torch.uint8).numpy()
    size, kinds = values.dtype.itemsize, (KINDS[format_name(dtype)], KINDS[format_name(values.dtype)])
    if isinstance(merged, WeightedSum):
        kernel, settings = kernels("kernels").weighted_sum, (np.array(merged.factors, np.float64), merged.from_base)
    else:
        kernel, settings = kernels("kernels").sparse_sum, _sparse_settings(merged)
    for first, part in operands(merged.tensors, start, stop, _base(merged, counted)):
        begin = (first - start) * size
        own = (first, *settings) if isinstance(merged, SparseSum) else settings
        room = data[begin : begin + part.count * size]
        yield _Call(first, part, kernel, (*part.arguments, *own, counted, room, *kinds))


def _sparse_settings(merged: SparseSum) -> tuple[Any, ...]:
    """What the kernel takes of a plan."""
    return (
        np.array([_cut_bits(kept) for kept in merged.kept], np.int64),
        np.array([math.ceil(kept.probability * 2.0**53) for kept in merged.kept], np.int64),
        np.array([stream_key("uniform", merged.tensors.seed, kept.stream) for kept in merged.kept], np.int64),
        np.array([kept.factor for kept in merged.kept], np.float64),
        np.array(merged.weights, np.float64),
        merged.scale,
        merged.elect,
        merged.normalize,
        merged.total,
    )


def _base(merged: WeightedSum | SparseSum, counted: bool) -> Read | None:
    needed = isinstance(merged, SparseSum) or merged.from_base
    return merged.tensors.origin if needed else merged.tensors.base if counted else None


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
