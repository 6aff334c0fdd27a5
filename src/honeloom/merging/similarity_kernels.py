"""Compiled sums of `similarity`: stored bytes in, dot products of columns out, all in between in the caches.

Import this when a tensor is read: it loads numba.
"""

from __future__ import annotations

import numpy as np

from honeloom.merging.engine.row_kernels import Array, at, compiled, decode, fill

__all__ = ["add_rows"]

_TILE, _ROWS = 256, 4
"""Columns and rows at a time: with the sums of some models' pairs they stay in the first caches."""
_U8, _U16 = np.uint8, np.uint16


@compiled
def _add_products(sums: Array, one: Array, other: Array) -> None:
    """Products of four rows, one after another; every product and sum is rounded apart."""
    n = sums.size
    for i in range(n):
        total = sums[i]
        total += one[i] * other[i]
        total += one[n + i] * other[n + i]
        total += one[2 * n + i] * other[2 * n + i]
        total += one[3 * n + i] * other[3 * n + i]
        sums[i] = total


@compiled
def _to_delta(row: Array, origin: Array, code: Array) -> None:
    """Model to task vector, and the signs of its entries: 0 for none, 1 for plus, 3 for minus."""
    for i in range(row.size):
        delta = row[i] - origin[i]
        row[i] = delta
        code[i] = _U8(_U8(delta != 0.0) | (_U8(delta < 0.0) << _U8(1)))


@compiled
def _count_signs(one: Array, other: Array) -> tuple[int, int]:
    """Entries of four rows that both change, and with one sign; in 16 bits, which vectorise."""
    changed, alike = _U16(0), _U16(0)
    for i in range(one.size):
        both = _U8(one[i] & other[i] & _U8(1))
        changed = _U16(changed + both)
        alike = _U16(alike + (both & _U8(one[i] == other[i])))
    return int(changed), int(alike)


@compiled
def _load(room: Array, address: int, kind: int, p: int, n: int, columns: int, rows: int) -> None:
    """Parts of some rows, one after another; zeros for those that are missing to four, which change no sum."""
    for r in range(rows):
        decode(room[r * n : r * n + n], at(address, kind, p + r * columns, n), kind)
    fill(room[rows * n :], 0.0)


@compiled
def add_rows(
    count: int, base: int, base_kind: int, where: Array, kinds: Array, columns: int,
    sums: Array, deltas: Array, signs: Array,
) -> None:  # fmt: skip
    """Add some rows of a matrix to the sums of `column_products` and, with a base, of the task vectors.

    Parameters
    ----------
    count, base, base_kind, where, kinds
        See `honeloom.merging.engine.kernels`; whole rows, one after another.
    columns : int
        Length of a row.
    sums, deltas : ndarray
        (N (N + 1) / 2, columns), float64; without a base `deltas` is not touched.
    signs : ndarray
        (2, N (N + 1) / 2), int64: added to as `sign_counts` has them.
    """
    models = where.size
    room, origin = np.empty((models, _ROWS * _TILE)), np.empty(_ROWS * _TILE)
    codes = np.empty((models, _ROWS * _TILE), np.uint8)
    for c in range(0, columns, _TILE):
        n = min(_TILE, columns - c)
        m = _ROWS * n
        for p in range(c, count, _ROWS * columns):
            rows = min(_ROWS, (count - p + columns - 1) // columns)
            for k in range(models):
                _load(room[k, :m], where[k], kinds[k], p, n, columns, rows)
                for j in range(k + 1):
                    _add_products(sums[k * (k + 1) // 2 + j, c : c + n], room[k], room[j])
            if not base:
                continue
            _load(origin[:m], base, base_kind, p, n, columns, rows)
            for k in range(models):
                _to_delta(room[k, :m], origin, codes[k])
                for j in range(k + 1):
                    pair = k * (k + 1) // 2 + j
                    _add_products(deltas[pair, c : c + n], room[k], room[j])
                    changed, alike = _count_signs(codes[k, :m], codes[j])
                    signs[0, pair] += changed
                    signs[1, pair] += alike
