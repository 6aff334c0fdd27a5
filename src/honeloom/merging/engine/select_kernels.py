"""Compiled passes over the sizes of task vectors, for `honeloom.merging.engine.select`.

Every function begins with `Operands.arguments`, as in `honeloom.merging.engine.kernels`. A size is the absolute
value of model minus base, or of the model where there is no base; it is compared by the bits of the float64, which
are in the order of the numbers, with NaN above all. Import this when a tensor is read: it loads numba.
"""

from __future__ import annotations

import numpy as np

from honeloom.merging.engine.row_kernels import MAGNITUDE, ROW, Array, at, compiled, decode, fill, int64_of
from honeloom.merging.engine.select import BINS, FIRST, SHIFT

__all__ = ["collect", "histograms", "refine", "seek"]

_I32, _U8, _U16, _U32 = np.int32, np.uint8, np.uint16, np.uint32
_FIRST, _SHIFT = _I32(FIRST >> 32), _I32(SHIFT - 32)


@compiled
def _load_sizes(bits: Array, row: Array, origin: Array, address: int, kind: int, p: int) -> None:
    """Bits of the distances from the base, which are in the order of the numbers."""
    decode(row, at(address, kind, p, row.size), kind)
    for i in range(row.size):
        bits[i] = int64_of(row[i] - origin[i]) & MAGNITUDE


@compiled
def _load_origin(origin: Array, base: int, kind: int, p: int) -> None:
    if base:
        decode(origin, at(base, kind, p, origin.size), kind)
    else:
        fill(origin, 0.0)


@compiled
def _bins(bins: Array, bits: Array) -> int:
    """Bins 1 and above of the first pass, by the upper halves of the bits; how many sizes are exactly 0."""
    for i in range(bits.size):
        slot = _I32(_I32(_I32(_I32(bits[i] >> 32) - _FIRST) >> _SHIFT) + _I32(2))
        bins[i] = _U16(min(max(slot, _I32(1)), _I32(BINS - 1)))
    zeros = 0
    for i in range(bits.size):
        zeros += bits[i] == 0
    return zeros


@compiled
def _count(counts: Array, bins: Array, n: int) -> None:
    """Four counts of each bin in turn, for a count waits for the one before it in the same place."""
    a, b, c, d = counts[0], counts[1], counts[2], counts[3]
    for i in range(n // 4):
        a[bins[4 * i]] += _U32(1)
        b[bins[4 * i + 1]] += _U32(1)
        c[bins[4 * i + 2]] += _U32(1)
        d[bins[4 * i + 3]] += _U32(1)
    for i in range(n - n % 4, n):
        a[bins[i]] += _U32(1)


@compiled
def histograms(count: int, base: int, base_kind: int, where: Array, kinds: Array, counts: Array, zeros: Array) -> None:
    """Count the sizes of every model by bin of the first pass.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See the module.
    counts : ndarray
        (K, 4, BINS), uint32, added to: one of the four counts of the size's bin, where 0 counts as the next size.
    zeros : ndarray
        (K,), int64, added to: how many sizes are 0.
    """
    row, origin, bits, bins = np.empty(ROW), np.empty(ROW), np.empty(ROW, np.int64), np.empty(ROW, np.uint16)
    for p in range(0, count, ROW):
        n = min(ROW, count - p)
        _load_origin(origin[:n], base, base_kind, p)
        for k in range(where.size):
            _load_sizes(bits[:n], row[:n], origin[:n], where[k], kinds[k], p)
            zeros[k] += _bins(bins[:n], bits[:n])
            _count(counts[k], bins, n)


@compiled
def _room() -> tuple[Array, Array, Array, Array, Array]:
    """A row of the model, of the base, of bits, and room for `_hits`."""
    marks, hits = np.empty(ROW + 8, np.uint8), np.empty(ROW + 8, np.int64)
    return np.empty(ROW), np.empty(ROW), np.empty(ROW, np.int64), marks, hits


@compiled
def _hits(bits: Array, low: int, high: int, marks: Array, hits: Array) -> int:
    """How many sizes are within low <= bits <= high, and where; eight are passed at once, for most rows have few."""
    for i in range(bits.size):
        marks[i] = _U8((bits[i] >= low) & (bits[i] <= high))
    fill(marks[bits.size : bits.size + 8], 0)
    words, found = marks.view(np.uint64), 0
    for w in range((bits.size + 7) // 8):
        if words[w] != 0:
            for i in range(8 * w, 8 * w + 8):
                hits[found] = i
                found += marks[i]
    return found


@compiled
def refine(
    count: int, base: int, base_kind: int, where: Array, kinds: Array,
    model: int, low: int, high: int, shift: int, counts: Array, ends: Array,
) -> None:  # fmt: skip
    """Count sizes of one model within low <= bits <= high by (bits - low) >> shift.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See the module.
    model, low, high, shift : int
        Which model, and which bins.
    counts : ndarray
        (bins,), int64, added to.
    ends : ndarray
        (bins, 2), int64, updated: smallest and largest bits met.
    """
    row, origin, bits, marks, hits = _room()
    for p in range(0, count, ROW):
        n = min(ROW, count - p)
        _load_origin(origin[:n], base, base_kind, p)
        _load_sizes(bits[:n], row[:n], origin[:n], where[model], kinds[model], p)
        for i in hits[: _hits(bits[:n], low, high, marks, hits)]:
            slot = (bits[i] - low) >> shift
            counts[slot] += 1
            ends[slot, 0] = min(ends[slot, 0], bits[i])
            ends[slot, 1] = max(ends[slot, 1], bits[i])


@compiled
def collect(
    count: int, base: int, base_kind: int, where: Array, kinds: Array,
    model: int, low: int, high: int, first: int, filled: int, sizes: Array, places: Array,
) -> int:  # fmt: skip
    """Copy sizes of one model within low <= bits <= high, in order.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See the module.
    model, low, high : int
        Which model, and which sizes.
    first : int
        Index of the first element in its tensor.
    filled : int
        How many are there already.
    sizes, places : ndarray
        Room for all, int64: get the bits and the indices.

    Returns
    -------
    int
        How many are there now.
    """
    row, origin, bits, marks, hits = _room()
    for p in range(0, count, ROW):
        n = min(ROW, count - p)
        _load_origin(origin[:n], base, base_kind, p)
        _load_sizes(bits[:n], row[:n], origin[:n], where[model], kinds[model], p)
        for i in hits[: _hits(bits[:n], low, high, marks, hits)]:
            sizes[filled], places[filled] = bits[i], first + p + i
            filled += 1
    return filled


@compiled
def seek(
    count: int, base: int, base_kind: int, where: Array, kinds: Array, model: int, size: int, wanted: int
) -> tuple[int, int]:
    """Find an occurrence of one size of one model.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See the module.
    model, size : int
        Which model, and the bits.
    wanted : int
        1 for the first occurrence, and so on.

    Returns
    -------
    (int, int)
        Its place, or -1; occurrences met, at most `wanted`.
    """
    row, origin, bits, marks, hits = _room()
    met = 0
    for p in range(0, count, ROW):
        n = min(ROW, count - p)
        _load_origin(origin[:n], base, base_kind, p)
        _load_sizes(bits[:n], row[:n], origin[:n], where[model], kinds[model], p)
        found = _hits(bits[:n], size, size, marks, hits)
        if met + found >= wanted:
            return p + hits[wanted - met - 1], wanted
        met += found
    return -1, met
