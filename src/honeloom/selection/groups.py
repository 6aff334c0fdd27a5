"""Rows in groups, and the rows that stand for each: the players of a valuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from honeloom.errors import RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.clusters import kmeans
from honeloom.selection.projection import plane
from honeloom.selection.vectors import blocks_of, inverse_lengths
from honeloom.types.ports import Vectors

__all__ = ["Groups", "by_label", "by_vectors", "nearest_of_all", "representatives"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows in groups.

    Attributes
    ----------
    label : array (N,)
        Group of every row; -1 for a row without a vector.
    distance : array (N,)
        To the middle of the group; where groups are labels, a random number.
    centroids : array (k, d) or None
        Middles, where groups are clusters of vectors.
    plane : array (N, 2) or None
        The rows in the plane of their largest variance, for a map.
    """

    label: IntArray
    distance: npt.NDArray[np.float32]
    centroids: Vectors | None = None
    plane: Vectors | None = None

    @property
    def count(self) -> int:
        """How many groups there are."""
        return int(self.label.max(initial=-1)) + 1


def by_vectors(vectors: Vectors, count: int, *, ids: Sequence[str], seed: int) -> Groups:
    """k-means of unit vectors (N, d); a zero vector belongs nowhere."""
    usable = inverse_lengths(vectors) > 0
    at = np.flatnonzero(usable)
    if not len(at):
        raise RowsError(f"none of the {len(ids)} rows has a vector; use another embedding")
    whole = len(at) == len(ids)  # then a memory map stays one
    found = kmeans(
        vectors if whole else vectors[at], count, seed=seed, ids=ids if whole else [ids[i] for i in at.tolist()]
    )
    label, distance = np.full(len(ids), -1, dtype=np.int64), np.zeros(len(ids), dtype=np.float32)
    label[at], distance[at] = found.labels, found.distances
    return Groups(label, distance, found.centroids, plane(vectors, ids=ids, seed=seed))


def by_label(labels: Sequence[str | None], *, ids: Sequence[str], seed: int) -> Groups:
    """One group per label, in the labels' order; rows without a label are a group of their own."""
    names = sorted({label or "" for label in labels})
    place = {name: i for i, name in enumerate(names)}
    label = np.array([place[name or ""] for name in labels], dtype=np.int64)
    return Groups(label, keyed_uniform(seed, "groups/label", ids).astype(np.float32))


def representatives(groups: Groups, allowed: npt.NDArray[np.bool_], each: int, ids: Sequence[str]) -> list[list[int]]:
    """Rows that stand for every group: its allowed members nearest to the middle, ties to the lowest id.

    Parameters
    ----------
    groups : Groups
        Of N rows.
    allowed : array (N,), bool
        Which rows may stand for a group.
    each : int
        Rows per group, fewer where there are no more.
    ids : sequence of str
        Of the rows.

    Returns
    -------
    list of list of int
        Per group; empty where no member is allowed.
    """
    usable = np.flatnonzero(allowed & (groups.label >= 0))
    order = usable[np.lexsort((groups.distance[usable], groups.label[usable]))]
    found: list[list[int]] = [[] for _ in range(groups.count)]
    for start, stop in _runs(groups.label[order]):
        members = order[start:stop]
        last = groups.distance[members[min(each, len(members)) - 1]]
        near = members[: np.searchsorted(groups.distance[members], last, side="right")].tolist()
        found[int(groups.label[members[0]])] = sorted(near, key=lambda i: (groups.distance[i], ids[i]))[:each]
    return found


def nearest_of_all(vectors: Vectors, centroids: Vectors, allowed: npt.NDArray[np.bool_]) -> list[int]:
    """For every centroid the nearest allowed row, its own or not: two centroids may share one, as in SHED's release."""
    best = np.full(len(centroids), -np.inf)
    place = np.zeros(len(centroids), dtype=np.int64)
    for part in blocks_of(len(vectors)):
        rows = np.asarray(vectors[part], dtype=np.float32)
        closeness = rows @ centroids.T - 0.5 * (rows**2).sum(1)[:, None]
        closeness[~allowed[part]] = -np.inf
        top = closeness.argmax(axis=0)
        value = closeness[top, np.arange(len(centroids))]
        better = value > best
        best[better], place[better] = value[better], part.start + top[better]
    return [int(p) for p in place]


def _runs(labels: IntArray) -> list[tuple[int, int]]:
    """Start and end of every run of equal labels."""
    if not len(labels):
        return []
    starts = np.flatnonzero(np.concatenate(([True], labels[1:] != labels[:-1])))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(labels)], strict=True))
