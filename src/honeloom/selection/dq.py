"""Dataset quantization: bins filled by greedy graph cut, each sampled evenly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.ops.noise import keyed_uniform
from honeloom.selection.config import HiddenEmbedding
from honeloom.selection.vectors import blocks_of, inverse_lengths
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["dq", "graph_cut_bins"]

Vectors = npt.NDArray[np.float32]
Bins = npt.NDArray[np.int64]
STEPS = 5000
"""Greedy choices in all; more rows than this are chosen several at a time."""
_DEFAULT = HiddenEmbedding()


def dq(data: SelectionData, *, bins: int = 10, embedding: Any = _DEFAULT) -> Scores:
    """Cut the rows into bins by greedy graph cut, and order them so that every prefix samples the bins evenly.

    The score of a row is 1 minus its random place in its bin as a share of the bin, so the top
    p % are p % of every bin, up to rounding. See `graph_cut_bins` for the bins. The step of the
    paper that drops parts of an image has no counterpart here.

    Parameters
    ----------
    data : SelectionData
        With `embed`.
    bins : int
        How many bins; at most one per row.
    embedding : Embedding
        What makes rows comparable.

    Returns
    -------
    Scores
        In (0, 1); column `bin` counts from 0, the one filled first. Rows without a vector are
        -inf and have no bin.

    References
    ----------
    Zhou et al. 2023, arXiv:2308.10524.
    """
    ids = data.rows.ids
    draws = keyed_uniform(data.seed, "dq/row", ids)
    found = graph_cut_bins(data.embed(data.rows, embedding), bins, ties=draws)
    values = np.full(len(ids), -math.inf)
    for number in range(int(found.max(initial=-1)) + 1):
        members = np.flatnonzero(found == number)
        places = np.empty(len(members))
        places[np.argsort(draws[members], kind="stable")] = np.arange(len(members))
        values[members] = 1.0 - (places + 0.5) / len(members)
    columns = {"bin": [None if b < 0 else b for b in found.tolist()]}
    order = np.lexsort((draws, -values)).tolist()
    return Scores(tuple(values.tolist()), True, "dq", columns=columns, order=order)


def graph_cut_bins(vectors: Vectors, bins: int, *, ties: npt.NDArray[np.float64]) -> Bins:
    """Bin (N,) of every row, -1 for one without a vector.

    A bin is filled greedily, without replacement, by the gain of the graph cut function over
    the rows R left when the bin was begun and those S already in it,

        sum of cos(x, r) over r in R without S  -  sum of cos(x, s) over s in S,

    so it takes what stands for the rest and repeats nothing. Bins are equally large, the first
    ones by one row more.

    Parameters
    ----------
    vectors : array (N, d)
        A memory map is read in blocks.
    bins : int
        How many.
    ties : array (N,)
        Of rows with equal gain, the one with the lowest number is taken.

    Notes
    -----
    Cosines are inner products of unit rows, so sums of them are inner products with sums of
    rows: no similarity matrix is made, and a choice changes every gain by one matrix product.
    Up to 5,000 rows this is the exact greedy rule, O(N^2 d). Above, N / 5,000 rows with the
    largest gains are taken at a time before the gains are computed again: O(5,000 N d).
    Memory is O(N) beside the vectors.
    """
    scale = inverse_lengths(vectors)
    free = scale > 0
    found = np.full(len(vectors), -1, dtype=np.int64)
    count = int(free.sum())
    at_once = max(1, math.ceil(count / STEPS))
    for number, size in enumerate(_sizes(count, bins)):
        rest = _products(vectors, scale, _total(vectors, scale * free))
        gain = np.where(free, rest, -math.inf)
        while size:
            taken = _best(gain, ties, min(at_once, size))
            found[taken] = number
            free[taken] = False
            size -= len(taken)
            if size:
                gain -= 2.0 * _products(vectors, scale, _total(vectors[taken], scale[taken]))
                gain[taken] = -math.inf
    return found


def _sizes(count: int, bins: int) -> list[int]:
    """Rows of every bin that has any."""
    return [size for size in (count // bins + (b < count % bins) for b in range(bins)) if size]


def _best(gain: npt.NDArray[np.float64], ties: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The rows with the largest gains."""
    if count == 1:
        equal = np.flatnonzero(gain == gain.max())
        return equal[[ties[equal].argmin()]]
    least = np.partition(gain, len(gain) - count)[len(gain) - count]
    near = np.flatnonzero(gain >= least)
    return near[np.lexsort((ties[near], -gain[near]))[:count]]


def _total(vectors: Vectors, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Weighted sum (d,) of the rows whose weight is not 0."""
    total = np.zeros(vectors.shape[1])
    for part in blocks_of(len(vectors)):
        held = weights[part] != 0
        rows = np.asarray(vectors[part], dtype=np.float32)[held]
        total += np.einsum("n,nd->d", weights[part][held], rows, dtype=np.float64)
    return total


def _products(
    vectors: Vectors, scale: npt.NDArray[np.float32], total: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Cosines' sums (N,): inner products of the unit rows with a sum of such rows, rounded to hide its order."""
    found = np.empty(len(vectors))
    row = total.astype(np.float32)
    with np.errstate(invalid="ignore"):
        for part in blocks_of(len(vectors)):
            found[part] = np.einsum("nd,d->n", np.asarray(vectors[part], dtype=np.float32), row) * scale[part]
    found[scale == 0] = 0.0
    return np.round(found, 4)
