"""Spherical interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from honeloom.merging.linear import weighted_sum

__all__ = ["BLOCK", "slerp", "slerp_weights"]

BLOCK = 1 << 16
"""Elements per partial sum of the statistics; fixed, so that no caller can change a bit."""

_SMALLEST_SINE = 1e-6

Read = Callable[[int, int], torch.Tensor]


def slerp(a: torch.Tensor, b: torch.Tensor, *, t: float = 0.5) -> torch.Tensor:
    """Interpolate along the arc between two tensors taken as vectors.

    The angle is that of the flattened tensors; the tensors keep their own lengths:
    sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b.

    Where no arc is defined, it is straight interpolation (1 - t) a + t b: one vector is zero,
    the directions agree to a sine of 1e-6, or they are opposite. Opposite vectors have no unique
    arc; equally long ones then give zero at t = 1/2.

    Parameters
    ----------
    a, b : Tensor
        One shape, any floating type.
    t : float
        0 gives a exactly, 1 gives b exactly.

    Returns
    -------
    Tensor
        That shape, float64; the caller rounds once.

    References
    ----------
    Shoemake 1985, doi:10.1145/325334.325242.
    """
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    weights = slerp_weights(lambda i, j: flat_a[i:j], lambda i, j: flat_b[i:j], a.numel(), t=t)
    return weighted_sum([a, b], weights)


def slerp_weights(a: Read, b: Read, count: int, *, t: float = 0.5) -> tuple[float, float]:
    """Factors of a and b, from one pass over both in fixed blocks.

    Parameters
    ----------
    a, b : callable
        Give elements start..stop of the flattened tensors.
    count : int
        Their number of elements.
    t : float
        As in `slerp`.
    """
    dots, squares_a, squares_b = [], [], []
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        x, y = a(start, stop).double(), b(start, stop).double()
        dots.append(_sum(x * y))
        squares_a.append(_sum(x * x))
        squares_b.append(_sum(y * y))
    length = math.sqrt(_total(squares_a)) * math.sqrt(_total(squares_b))
    cosine = _total(dots) / length if length > 0 else math.nan
    angle = math.acos(max(-1.0, min(1.0, cosine))) if math.isfinite(cosine) else 0.0
    if math.sin(angle) < _SMALLEST_SINE:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _sum(values: torch.Tensor) -> float:
    # numpy adds pairwise in one thread; torch splits a long sum among its threads, whose number varies.
    return float(values.numpy().sum())


def _total(parts: list[float]) -> float:
    """Exact sum, rounded once; NaN and infinity (allowed inputs may hold them) pass through."""
    return math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)
