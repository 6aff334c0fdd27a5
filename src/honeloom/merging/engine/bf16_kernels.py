"""Sums of bfloat16 rounded to bfloat16, compiled: in float32 where that is sure to give the same.

Sums in float64, rounded once, are what counts. Float32 takes less than half the time, and as a rule it is so near that
every number within the bound of its error is rounded alike; the few elements of which that is not true are computed
again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from honeloom.merging.engine.operands import KINDS
from honeloom.merging.engine.row_kernels import (
    Array,
    all_finite,
    at,
    bf16_bits,
    compiled,
    fill,
    single,
    uint32_of,
)  # fmt: skip

__all__ = ["HALF_ROW", "error_share", "narrow", "near_sum", "sum_exactly"]

HALF_ROW = 2048
"""Elements at a time: few calls, and still in the first-level cache."""
_RARE = 64
"""One unsure element in so many is worth a look at each."""
_U16, _U32 = np.uint16, np.uint32
_BF16, _F32 = KINDS["BF16"], KINDS["F32"]
_INFINITY, _SIZE, _UPPER = _U32(0x7F800000), _U32(0x7FFFFFFF), _U32(0xFFFF0000)
_BELOW, _HALF = _U32(0x7FFF), _U32(0x8000)
_TINY = np.float32(2.0**-90)
"""More than all that is lost below the smallest numbers, even where they count as 0."""
_LEAST, _MOST = 2.0**-60, 2.0**20


@compiled
def error_share(factors: Array, from_base: bool) -> Any:
    """Largest error of a float32 sum as a share of the sum of its terms' sizes; 0 if there is no such bound.

    In units of 2**-24: one each for a factor, a product, every sum and the ends of the interval, and with a base two
    more for the differences and the sum with it. One hundredth covers the rest.
    """
    for i in range(factors.size):
        if factors[i] != 0.0 and not _LEAST <= abs(factors[i]) <= _MOST:
            return np.float32(0.0)
    units = factors.size + (4 if from_base else 2)
    return np.float32(1.01 * units * 2.0**-24 if 0 < factors.size <= 1000 else 0.0)


@compiled
def _halves(address: int, p: int, n: int) -> Any:
    return at(address, _BF16, p, n).view(np.uint16)


@compiled
def _near_two(
    total: Array, sizes: Array, one: Array, by: Any, other: Array, times: Any, origin: Any, out: Any, share: Any
) -> int:
    """Add two models' products in float32, and their sizes; with `out` these are the last, and are rounded.

    Whether `origin` and `out` are None is known at compilation.

    Returns
    -------
    int
        How many elements are not sure, which have a bit in their lower half; -1 if some are not finite.
    """
    unsure, most = _U32(0), _U32(0)
    for i in range(total.size):
        x, y, start = single(one[i]), single(other[i]), np.float32(0.0)
        if origin is not None:
            start = single(origin[i])
            x -= start
            y -= start
        x *= by
        y *= times
        value = total[i] + x + y
        size = sizes[i] + abs(x) + abs(y)
        if out is None:
            total[i], sizes[i] = value, size
        else:
            if origin is not None:
                value += start
                size += abs(start)
            margin = size * share + _TINY
            low, high = uint32_of(value - margin), uint32_of(value + margin)
            bits = _U32(_U32(low + _BELOW) & _UPPER)
            differs = _U32(1) if bits != _U32(_U32(high + _HALF) & _UPPER) else _U32(0)
            unsure = _U32(unsure + differs)
            most = max(most, _U32(bits & _SIZE))
            out[i] = _U32(bits | differs)
    return -1 if most >= _INFINITY else int(unsure)


@compiled
def _exact_one(i: int, where: Array, factors: Array, base: int) -> Any:
    """Bits of one element through float64."""
    value = 0.0
    start = np.float64(single(_halves(base, i, 1)[0])) if base else 0.0
    for k in range(where.size):
        value += (np.float64(single(_halves(where[k], i, 1)[0])) - start) * factors[k]
    return bf16_bits(value + start if base else value)


@compiled
def near_sum(
    bits: Array, room: Array, where: Array, singles: Array, factors: Array, base: int, share: Any, p: int
) -> bool:
    """A row of the sum through float32.

    Parameters
    ----------
    bits : ndarray
        (n,), uint32: gets the result, bfloat16 as float32.
    room : ndarray
        (2, HALF_ROW), float32, for anything.
    where : ndarray
        Addresses of K models, (K,) int64.
    singles, factors : ndarray
        (K,), the same as float32 and float64.
    base : int
        Address of the base, if task vectors are summed and it is added; else 0.
    share : float32
        `error_share`, not 0.
    p : int
        Place of the first element.

    Returns
    -------
    bool
        False, and nothing is right, if much of the result is not sure, or some not finite.
    """
    n, last, unsure = bits.size, where.size - 1, 0
    total, sizes = room[0, :n], room[1, :n]
    fill(total, np.float32(0.0))
    fill(sizes, np.float32(0.0))
    for k in range(0, where.size, 2):
        other = min(k + 1, last)
        one, two = _halves(where[k], p, n), _halves(where[other], p, n)
        by, times = singles[k], singles[other] if other > k else np.float32(0.0)
        if base:
            origin = _halves(base, p, n)
            if other < last:
                _near_two(total, sizes, one, by, two, times, origin, None, share)
            else:
                unsure = _near_two(total, sizes, one, by, two, times, origin, bits, share)
        elif other < last:
            _near_two(total, sizes, one, by, two, times, None, None, share)
        else:
            unsure = _near_two(total, sizes, one, by, two, times, None, bits, share)
    if unsure < 0 or unsure > n // _RARE:
        return False
    i = 0
    while unsure > 0:
        if bits[i] & _U32(1):
            bits[i] = _exact_one(p + i, where, factors, base)
            if bits[i] & _SIZE >= _INFINITY:
                return False
            unsure -= 1
        i += 1
    return True


@compiled
def _add(total: Array, one: Array, by: float, origin: Any) -> None:
    """Add a model's products, or those of its task vector from an origin that is not None, in float64."""
    for i in range(total.size):
        value = np.float64(single(one[i]))
        if origin is not None:
            value -= np.float64(single(origin[i]))
        total[i] += value * by


@compiled
def _round(bits: Array, total: Array) -> None:
    for i in range(bits.size):
        bits[i] = bf16_bits(total[i])


@compiled
def sum_exactly(bits: Array, total: Array, where: Array, factors: Array, base: int, p: int) -> bool:
    """A row of the sum through float64.

    Parameters
    ----------
    total : ndarray
        (n,), float64, for anything.
    bits, where, factors, base, p
        As in `near_sum`.

    Returns
    -------
    bool
        False, and nothing is right, if not all is finite. What is not finite in a model is not finite in the sum.
    """
    n = bits.size
    fill(total, 0.0)
    if base:
        origin = _halves(base, p, n)
        for k in range(where.size):
            _add(total, _halves(where[k], p, n), factors[k], origin)
        _add(total, origin, 1.0, None)
    else:
        for k in range(where.size):
            _add(total, _halves(where[k], p, n), factors[k], None)
    _round(bits, total)
    return bool(all_finite(bits.view(np.uint8), _F32))


@compiled
def narrow(out: Array, bits: Array) -> None:
    """Upper halves, which are all there is to bfloat16."""
    for i in range(bits.size):
        out[i] = _U16(bits[i] >> _U32(16))
