"""Compiled merging for one CPU thread: stored bytes in, stored bytes out, all in between in the first-level cache.

Every function begins with `Operands.arguments`: the number of elements; the base, its address (0: none) and kind; the
models' addresses and kinds, (K,) int64. Elements go in rows, each decoded to float64, combined and encoded once.
Nothing is contracted or reassociated: every product and sum is rounded by itself, in the order of the models, as in the
plain torch functions that these equal to the bit. A NaN is written as one quiet NaN, whatever bits it had.
Import this when a tensor is read: it loads numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from honeloom.merging.engine.bf16_kernels import HALF_ROW, error_share, narrow, near_sum, sum_exactly
from honeloom.merging.engine.gram import LANES
from honeloom.merging.engine.operands import KINDS
from honeloom.merging.engine.row_kernels import MAGNITUDE, ROW, Array, at, compiled, decode, fill, int64_of, load, store
from honeloom.merging.engine.tensors import BLOCK
from honeloom.ops.noise_kernels import words

__all__ = ["gram", "sparse_sum", "weighted_sum"]

_I64, _U64 = np.int64, np.uint64
_BF16 = KINDS["BF16"]
_ALL = _I64(1 << 53)


@compiled
def _axpy(total: Array, row: Array, by: float) -> None:
    """Product and sum are rounded apart."""
    for i in range(total.size):
        total[i] += row[i] * by


@compiled
def _axpy_delta(total: Array, row: Array, origin: Array, by: float) -> None:
    for i in range(total.size):
        total[i] += (row[i] - origin[i]) * by


@compiled
def _sum_row(
    total: Array, row: Array, start: Array, base: int, base_kind: int, where: Array, kinds: Array,
    factors: Array, from_base: bool, p: int, found: Array,
) -> None:  # fmt: skip
    """A row of any types; `found` as in `load`."""
    fill(total, 0.0)
    if base:
        load(start, base, base_kind, p, where.size, found)
    for k in range(where.size):
        load(row, where[k], kinds[k], p, k, found)
        if from_base:
            _axpy_delta(total, row, start, factors[k])
        else:
            _axpy(total, row, factors[k])
    if from_base:
        _axpy(total, start, 1.0)


@compiled
def _weighted_halves(
    count: int, base: int, where: Array, kinds: Array, factors: Array, out: Array, kind: int, held: int, compared: int
) -> Any:
    """`weighted_sum` of bfloat16 that is not compared: the cheapest way that is sure, row by row."""
    merged, row, origin, room = np.empty(HALF_ROW), np.empty(ROW), np.empty(ROW), np.empty((2, ROW))
    near, spare = np.empty((2, HALF_ROW), np.float32), np.empty(HALF_ROW, np.uint32)
    singles, share = np.empty(factors.size, np.float32), error_share(factors, base != 0)
    for k in range(factors.size):
        singles[k] = factors[k]
    found, missed = np.full(3, -1, np.int64), 0
    for p in range(0, count, HALF_ROW):
        n = min(HALF_ROW, count - p)
        bits = spare[:n] if held == kind else out[4 * p : 4 * (p + n)].view(np.uint32)
        # With weights such as 1/2 and 1/2 many sums lie on the very middle, and no try would succeed.
        sure = share > 0 and missed <= 8 + p // (2 * HALF_ROW)
        if sure:
            sure = near_sum(bits, near, where, singles, factors, base, share, p)
            missed += not sure
        if sure or sum_exactly(bits, merged[:n], where, factors, base, p):
            if held == kind:
                narrow(out[2 * p : 2 * (p + n)].view(np.uint16), bits)
            continue
        for q in range(p, p + n, ROW):
            total, begin = merged[: min(ROW, p + n - q)], origin[: min(ROW, p + n - q)]
            _sum_row(total, row[: total.size], begin, base, kind, where, kinds, factors, base != 0, q, found)
            store(out, kind, held, total, begin, compared, kind, q, found, room)
    return found[0], found[1], found[2], 0


@compiled
def weighted_sum(
    count: int, base: int, base_kind: int, where: Array, kinds: Array,
    factors: Array, from_base: bool, counted: bool, out: Array, kind: int, held: int,
) -> Any:  # fmt: skip
    """`WeightedSum`, rounded once.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See the module.
    factors : ndarray
        (K,), float64.
    from_base : bool
        Sum task vectors, and add the base.
    counted : bool
        Compare the result with the base.
    out : ndarray
        (count times the size,), uint8: gets the result.
    kind : int
        To which the result is rounded: F64, F32, BF16 or F16.
    held : int
        How that is written: the same, or F32 instead of BF16 or F16.

    Returns
    -------
    tuple of four int
        Model (K: the base) and place of the first input element that is NaN or infinite, place of the first such
        element of the result, each -1 if there is none; number of elements that the merge moves away from the base and
        the rounding back to it (0 without a base, or if not counted).
    """
    merged, row, origin, room = np.empty(ROW), np.empty(ROW), np.empty(ROW), np.empty((2, ROW))
    compared = base if counted else 0
    halves = kind == _BF16 and compared == 0 and where.size > 0 and (not from_base or base_kind == _BF16)
    for k in range(kinds.size):
        halves &= kinds[k] == _BF16
    if halves:
        return _weighted_halves(count, base if from_base else 0, where, kinds, factors, out, kind, held, compared)
    found, lost = np.full(3, -1, np.int64), 0
    for p in range(0, count, ROW):
        n = min(ROW, count - p)
        total, start = merged[:n], origin[:n]
        _sum_row(total, row[:n], start, base, base_kind, where, kinds, factors, from_base, p, found)
        lost += store(out, kind, held, total, start, compared, base_kind, p, found, room)
    return found[0], found[1], found[2], lost


@compiled
def _keep(row: Array, origin: Array, cuts: Array, index: int, factor: float, weight: float) -> None:
    """Scaled task vectors' entries, and 0 where a cut drops them; in runs, for a tie is chosen up to an index."""
    low, low_last, high, high_last = cuts
    a = 0
    while a < row.size:
        b = row.size
        for last in (low_last, high_last):
            if a <= last - index and last - index + 1 < b:
                b = last - index + 1
        least, most = low + _I64(index + a > low_last), high - _I64(index + a <= high_last)
        _keep_run(row[a:b], origin[a:b], least, most, factor, weight)
        a = b


@compiled
def _keep_run(row: Array, origin: Array, least: int, most: int, factor: float, weight: float) -> None:
    for i in range(row.size):
        delta = row[i] - origin[i]
        size = int64_of(delta) & MAGNITUDE
        row[i] = weight * (delta * factor) if (size >= least) & (size <= most) else 0.0


@compiled
def _drop(row: Array, even: Array, odd: Array, index: int, threshold: int, key: Array) -> None:
    """Zero where the uniform number of the element is not below the probability; a counter gives two elements."""
    skipped = index % 2
    words(even, odd, index // 2, (row.size + skipped + 1) // 2, key[0], key[1])
    left, right = even[skipped:], odd[skipped:]
    for i in range(row.size):
        number = _I64((_U64(left[i]) >> _U64(5)) << _U64(26) | _U64(right[i]) >> _U64(6))
        row[i] = row[i] if number < threshold else 0.0


@compiled
def _sum_elected(combined: Array, weight: Array, total: Array, row: Array, by: float) -> None:
    """Add a model's entries where they have the sign of the total, and its weight there."""
    for i in range(row.size):
        chosen = (row[i] != 0.0) & ((row[i] < 0.0) == (total[i] < 0.0))
        combined[i] += row[i] if chosen else 0.0
        weight[i] += by if chosen else 0.0


@compiled
def _scaled(merged: Array, weight: Array, origin: Array, scale: float) -> None:
    for i in range(merged.size):
        merged[i] = origin[i] + scale * (merged[i] / (weight[i] if weight[i] != 0.0 else 1.0))


@compiled
def _combine(
    merged: Array, rows: Array, weights: Array, room: Array, elect: bool, normalize: bool, total: float
) -> Any:
    """Sum of the models' entries, and what to divide it by."""
    plain, weight = room[0, : merged.size], room[1, : merged.size]
    fill(plain, 0.0)
    for k in range(weights.size):
        _axpy(plain, rows[k, : merged.size], 1.0)
    if not elect:
        for i in range(plain.size):
            merged[i], weight[i] = plain[i], total
        return weight
    fill(merged, 0.0)
    fill(weight, 0.0)
    for k in range(weights.size):
        _sum_elected(merged, weight, plain, rows[k, : merged.size], weights[k])
    if not normalize:
        fill(weight, 1.0)
    return weight


@compiled
def sparse_sum(
    count: int, base: int, base_kind: int, where: Array, kinds: Array,
    first: int, cuts: Array, thresholds: Array, keys: Array, factors: Array, weights: Array,
    scale: float, elect: bool, normalize: bool, total: float, counted: bool, out: Array, kind: int, held: int,
) -> Any:  # fmt: skip
    """`SparseSum`, rounded once.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See the module; there is a base.
    first : int
        Index of the first element in its tensor.
    cuts : ndarray
        (K, 4), int64: bits of `low.value` as float64 and `low.last` (-1 and -1: all), and the same of `high`
        (2**63 - 1 and -1: none).
    thresholds : ndarray
        (K,), int64: probability times 2**53, rounded up; 2**53 draws nothing.
    keys : ndarray
        (K, 2), int64: from `stream_key` for `uniform`.
    factors, weights : ndarray
        (K,), float64.
    scale, elect, normalize, total
        Of the `SparseSum`.
    counted, out, kind, held
        As in `weighted_sum`.

    Returns
    -------
    tuple of four int
        As in `weighted_sum`.
    """
    merged, origin, room = np.empty(ROW), np.empty(ROW), np.empty((2, ROW))
    rows, even, odd = np.empty((where.size, ROW)), np.empty(ROW + 2, np.uint32), np.empty(ROW + 2, np.uint32)
    found, lost = np.full(3, -1, np.int64), 0
    for p in range(0, count, ROW):
        n = min(ROW, count - p)
        result, start = merged[:n], origin[:n]
        load(start, base, base_kind, p, where.size, found)
        for k in range(where.size):
            row = rows[k, :n]
            load(row, where[k], kinds[k], p, k, found)
            _keep(row, start, cuts[k], first + p, factors[k], weights[k])
            if thresholds[k] < _ALL:
                _drop(row, even, odd, first + p, thresholds[k], keys[k])
        weight = _combine(result, rows, weights, room, elect, normalize, total)
        _scaled(result, weight, start, scale)
        lost += store(out, kind, held, result, start, base if counted else 0, base_kind, p, found, room)
    return found[0], found[1], found[2], lost


@compiled
def _add_products(lanes: Array, one: Array, other: Array) -> None:
    for i in range(one.size):
        lanes[i] += one[i] * other[i]


@compiled
def _subtract(row: Array, origin: Array) -> None:
    for i in range(row.size):
        row[i] -= origin[i]


@compiled
def _fold(lanes: Array) -> float:
    """Sum by halves, in place."""
    half = lanes.size // 2
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[half + i]
        half //= 2
    return float(lanes[0])


@compiled
def gram(count: int, base: int, base_kind: int, where: Array, kinds: Array, out: Array) -> None:
    """Dot products of all pairs of models, or of their task vectors, block by block, as `gram_block` has them.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See the module; with a base, task vectors. Begins at a multiple of BLOCK of the tensor.
    out : ndarray
        (number of blocks, K, K), float64: its upper triangles are set.
    """
    models = where.size
    rows, origin, lanes = np.empty((models, LANES)), np.empty(LANES), np.empty((models, models, LANES))
    for b in range(out.shape[0]):
        fill(lanes.reshape(lanes.size), 0.0)
        for p in range(b * BLOCK, min((b + 1) * BLOCK, count), LANES):
            n = min(LANES, count - p)
            if base:
                decode(origin[:n], at(base, base_kind, p, n), base_kind)
            for k in range(models):
                decode(rows[k, :n], at(where[k], kinds[k], p, n), kinds[k])
                if base:
                    _subtract(rows[k, :n], origin[:n])
                for j in range(k + 1):
                    _add_products(lanes[j, k, :n], rows[j, :n], rows[k, :n])
        for k in range(models):
            for j in range(k + 1):
                out[b, j, k] = _fold(lanes[j, k])
