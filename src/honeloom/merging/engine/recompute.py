"""A second computation of merged tensors by the plain path, to check what was written against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.reader import Checkpoint
from honeloom.merging.engine.streaming import COMPUTED, Merger
from honeloom.ops.noise import permutation, uniform
from honeloom.ops.rounding import round_once

__all__ = ["last_place_error", "recomputation_error"]

Array = npt.NDArray[np.float64]
_WINDOW = 1 << 17
_EASY = 1 << 25
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}


def recomputation_error(merger: Merger, written: Checkpoint, *, seed: int, tensors: int = 3) -> float:
    """Recompute some tensors of a written merge from its inputs, block by block in float64, without compiled kernels.

    Parameters
    ----------
    merger : Merger
        The merge.
    written : Checkpoint
        Its result, read back.
    seed : int
        Chooses the tensors, of those below 2**25 elements where there are any, and a window of 2**17 elements
        within a larger one.
    tensors : int
        How many.

    Returns
    -------
    float
        Largest distance from the float64 value, in units of the last place of the output type;
        correct rounding gives at most 0.5. Distances that float64 itself may cause do not count.
    """
    parts = [p for p in merger.parts if p.info.dtype in COMPUTED and p.info.elements]
    parts = [p for p in parts if p.info.elements <= _EASY] or parts
    worst = 0.0
    for i in permutation(seed, "merge/check", len(parts)).tolist()[:tensors]:
        part = parts[i]
        merged, plain = merger.plan(part, raw=False)
        start = int(float(uniform(seed, f"merge/check/{part.name}", 1)) * max(0, plain.count - _WINDOW))
        stop = min(plain.count, start + _WINDOW)
        exact = merged(start, stop)
        terms = [read(start, stop).abs() for read in (*plain.models, *((plain.base,) if plain.base else ()))]
        magnitude = torch.stack(terms).sum(dim=0).maximum(exact.abs())
        got = written.read_slice(part.name, start, stop)
        worst = max(worst, last_place_error(got, exact.numpy(), magnitude.numpy()))
    return worst


def last_place_error(values: torch.Tensor, exact: Array, magnitude: Array) -> float:
    """Largest distance of rounded values from exact ones, in units of their last place.

    Parameters
    ----------
    values : Tensor
        (n,), floating.
    exact : ndarray
        (n,), computed in float64.
    magnitude : ndarray
        (n,), sum of the absolute terms behind `exact`; 16 float64 roundings of it are allowed.

    Returns
    -------
    float
        Infinity where a value is not finite and its correct rounding is, or the other way round.
    """
    got: Array = values.double().numpy()
    rounded: Array = round_once(torch.from_numpy(exact), values.dtype).double().numpy()
    finite = np.isfinite(rounded)  # beyond the type's range infinity is right
    if not np.array_equal(got[~finite], rounded[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    got, exact, magnitude = got[finite], exact[finite], magnitude[finite]
    info = torch.finfo(values.dtype)
    _, exponent = np.frexp(exact)
    unit = np.maximum(np.ldexp(1.0, exponent - 1 - _MANTISSA_BITS[values.dtype]), info.tiny * info.eps)
    distance = np.maximum(np.abs(got - exact) - 16 * np.finfo(np.float64).eps * magnitude, 0.0)
    return float(np.max(distance / unit, initial=0.0))
