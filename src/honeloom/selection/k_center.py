"""Greedy k-center: rows that leave no row far from a chosen one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.selection.config import HiddenEmbedding
from honeloom.selection.vectors import blocks_of, inverse_lengths
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["greedy_centers", "k_center"]

Vectors = npt.NDArray[np.float32]
Distances = npt.NDArray[np.float32]
CENTERS = 4096
"""Rows that are chosen one by one where nobody says how many are wanted."""
ROUNDING = 1e-6
"""Squared distances below this are those of equal rows, but for the rounding of float32."""
_DEFAULT = HiddenEmbedding()


def k_center(data: SelectionData, *, embedding: Any = _DEFAULT) -> Scores:
    """Order the rows so that each next one is the farthest from those before it.

    Distances are Euclidean between vectors scaled to length 1. The first row is the nearest to
    the mean. Every prefix of the order covers the rows within at most twice the radius of the
    best choice of that size. Once `data.wanted` rows are chosen (4,096 if it is None), the
    others follow by their distance to the chosen ones, the farthest first. The greedy choice
    likes outliers: broken rows are better removed before.

    Parameters
    ----------
    data : SelectionData
        With `embed`.
    embedding : Embedding
        What makes rows comparable.

    Returns
    -------
    Scores
        `value` is the distance to the rows before it at the time of being chosen, in [0, 2];
        the first row has 2. `order` says which rows come first; rows without a vector are
        -inf and last. `details` holds `centers` and `radius`, the largest distance of a row
        to a chosen one.

    Notes
    -----
    Every choice passes over all N rows of length d once, in blocks: O(wanted N d) in time,
    one float per row in memory.

    References
    ----------
    Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5; Sener and Savarese 2018, arXiv:1708.00489.
    """
    vectors = data.embed(data.rows, embedding)
    wanted = CENTERS if data.wanted is None else data.wanted
    order, values = greedy_centers(vectors, data.rows.ids, wanted)
    chosen = min(wanted, int(np.isfinite(values).sum()))
    radius = float(values[order[chosen]]) if 0 < chosen < len(order) else 0.0
    details = {"centers": chosen, "radius": radius if math.isfinite(radius) else 0.0}
    return Scores(tuple(values.tolist()), True, "k_center", order=order.tolist(), details=details)


def greedy_centers(
    vectors: Vectors, ids: Sequence[str], wanted: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Order (N,) of all rows, and the value (N,) of each, as `k_center` defines them.

    Ties go to the lowest id, so that neither depends on the order of the rows.
    """
    by_id = np.empty(len(ids), dtype=np.int64)
    by_id[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    scale = inverse_lengths(vectors)
    usable = scale > 0
    values = np.full(len(ids), -math.inf)
    order: list[int] = []
    nearest = np.full(len(ids), 2.0, dtype=np.float32)
    score = np.where(usable, -_from_mean(vectors, scale), -math.inf)
    for _ in range(min(wanted, int(usable.sum()))):
        ties = np.flatnonzero(score == score.max())
        last = int(ties[by_id[ties].argmin()])
        order.append(last)
        values[last] = nearest[last]
        _approach(nearest, vectors, scale, last)
        usable[last] = False
        score = np.where(usable, nearest, -math.inf)
    values[usable] = nearest[usable]
    left = np.ones(len(ids), dtype=np.bool_)
    left[order] = False
    rest = np.flatnonzero(left)
    rest = rest[np.lexsort((by_id[rest], -values[rest]))]
    return np.concatenate((np.array(order, dtype=np.int64), rest)), values


def _from_mean(vectors: Vectors, scale: Distances) -> npt.NDArray[np.float64]:
    """Squared distance of every scaled row to their mean, up to a constant, rounded to hide the order of the sum."""
    mean = np.zeros(vectors.shape[1])
    for part in blocks_of(len(vectors)):
        rows = np.nan_to_num(np.asarray(vectors[part], dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        mean += scale[part].astype(np.float64) @ rows
    mean /= max(1, int((scale > 0).sum()))
    return np.round(1.0 - 2.0 * _products(vectors, scale, mean.astype(np.float32)).astype(np.float64), 5)


def _approach(nearest: Distances, vectors: Vectors, scale: Distances, last: int) -> None:
    """Lower the distance of every row to the nearest chosen one, now that row `last` is chosen."""
    row = np.asarray(vectors[last], dtype=np.float32) * scale[last]
    squares = 2.0 - 2.0 * _products(vectors, scale, row)
    squares[squares < ROUNDING] = 0.0
    np.minimum(nearest, np.sqrt(squares), out=nearest)
    nearest[last] = 0.0


def _products(vectors: Vectors, scale: Distances, row: Vectors) -> Distances:
    """Inner products (N,) of the scaled rows with one; einsum sums a row alike wherever it stands, BLAS may not."""
    found = np.empty(len(vectors), dtype=np.float32)
    with np.errstate(invalid="ignore"):
        for part in blocks_of(len(vectors)):
            rows = np.asarray(vectors[part], dtype=np.float32)
            found[part] = np.einsum("nd,d->n", rows, row) * scale[part]
    found[scale == 0] = 0.0
    return found
