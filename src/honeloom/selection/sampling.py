"""From values of clusters to an order of rows: SHED's two samplers (arXiv:2405.00705)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from honeloom.ops.noise import keyed_uniform

__all__ = ["cluster_probabilities", "effective_clusters", "qocs", "qwcs", "standardise"]

Values = npt.NDArray[np.float64]


def standardise(values: Values, how: Literal["z", "rank"] = "z") -> Values:
    """Put values (k,) on a common scale, so that the factor of `qwcs` means the same whatever their unit.

    z subtracts the mean and divides by the standard deviation; rank spreads the ranks evenly
    over [-1, 1]. Equal values give zeros.
    """
    if how == "rank":
        _, ranks = np.unique(values, return_inverse=True)
        top = ranks.max()
        return 2.0 * ranks / top - 1.0 if top else np.zeros(len(values))
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))


def cluster_probabilities(values: Values, factor: float) -> Values:
    """Softmax of factor x values, (k,): the chance that a draw takes a cluster."""
    weights = np.exp(factor * (values - values.max()))
    probabilities: Values = weights / weights.sum()
    return probabilities


def effective_clusters(probabilities: Values) -> float:
    """Exp of their entropy: among how many equally likely clusters a draw would choose as freely."""
    p = probabilities[probabilities > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def qocs(
    values: Values, labels: npt.NDArray[np.int64], distances: npt.NDArray[np.float32], ids: Sequence[str]
) -> npt.NDArray[np.int64]:
    """Quality-ordered cluster sampling: whole clusters by value, within each the nearest to the centroid first.

    Parameters
    ----------
    values : array (k,)
        Of the clusters.
    labels, distances : arrays (N,)
        Cluster of every row, and its distance to the centroid.
    ids : sequence of str
        Of the rows.

    Returns
    -------
    array (N,)
        All rows in the order in which they are taken. Equal values: the larger cluster first,
        then the one with the lowest id.
    """
    sizes = np.bincount(labels, minlength=len(values))
    lowest = _lowest_ids(labels, ids, len(values))
    order = sorted(range(len(values)), key=lambda c: (-values[c], -sizes[c], lowest[c]))
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(order))
    by_id = np.empty(len(ids), dtype=np.int64)
    by_id[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return np.lexsort((by_id, distances, place[labels]))


def qwcs(
    values: Values, labels: npt.NDArray[np.int64], ids: Sequence[str], *, factor: float, seed: int
) -> npt.NDArray[np.int64]:
    """Quality-weighted cluster sampling: a cluster by the softmax of its value, then one of its rows left.

    Parameters
    ----------
    values : array (k,)
        Of the clusters, standardised.
    labels : array (N,)
        Cluster of every row.
    ids : sequence of str
        Of the rows: what is drawn follows from them, not from their order.
    factor : float
        0 takes clusters evenly; the larger, the more the best ones alone.
    seed : int
        Of the draws.

    Returns
    -------
    array (N,)
        All rows in the order in which they are drawn. An exhausted cluster takes no part.

    Notes
    -----
    Every cluster is a clock that rings after exponential times at a rate equal to its
    probability. The rings of all clocks, sorted, follow the law of the sequential draws, for
    exponential times have no memory, and nothing has to be drawn twice.
    """
    logs = factor * (values - values.max())
    within = keyed_uniform(seed, "qwcs/row", ids)
    waits = -np.log1p(-keyed_uniform(seed, "qwcs/wait", ids))
    order = np.lexsort((within, labels))
    counts = np.bincount(labels, minlength=len(values))
    starts = np.cumsum(counts) - counts
    sums = np.cumsum(waits[order])
    before = np.concatenate(([0.0], sums))[starts]
    with np.errstate(divide="ignore"):
        rings = np.log(np.maximum(sums - before[labels[order]], 0.0)) - logs[labels[order]]
    return order[np.argsort(rings, kind="stable")]


def _lowest_ids(labels: npt.NDArray[np.int64], ids: Sequence[str], k: int) -> list[str]:
    lowest: list[str] = [""] * k
    for label, name in zip(labels.tolist(), ids, strict=True):
        if not lowest[label] or name < lowest[label]:
            lowest[label] = name
    return lowest
