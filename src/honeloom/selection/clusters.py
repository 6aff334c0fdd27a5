"""k-means at any size: seeded on a sample, assigned in pieces; and the row that stands for each cluster.

Seeding one centroid after another over all rows costs more than all of Lloyd's iterations, so
both begin on a sample; the rows themselves are passed a few times in blocks, so they may be a
memory map larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from honeloom.ops.noise import keyed_uniform, uniform

__all__ = ["Clusters", "kmeans", "nearest_rows", "unit_rows"]

Vectors = npt.NDArray[np.float32]
BLOCK = 8192
"""Rows per matrix product."""
SAMPLE_PER_CLUSTER = 10
SAMPLE_ITERATIONS = 6


@dataclass(frozen=True, slots=True)
class Clusters:
    """A partition of N rows.

    Attributes
    ----------
    centroids : array (k, d)
        Means of the members.
    labels : array (N,)
        Cluster of every row; every cluster has a member.
    distances : array (N,)
        Euclidean distance of every row to its centroid.
    """

    centroids: Vectors
    labels: npt.NDArray[np.int64]
    distances: Vectors

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Members of every cluster, (k,)."""
        return np.bincount(self.labels, minlength=len(self.centroids)).astype(np.int64)


def unit_rows(vectors: Vectors) -> tuple[Vectors, npt.NDArray[np.bool_]]:
    """Rows of length 1, and which of them can be used: zero, NaN and infinite rows become zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    scaled = np.zeros_like(vectors, dtype=np.float32)
    scaled[usable] = vectors[usable] / lengths[usable, None]
    return scaled, usable


def kmeans(
    vectors: Vectors,
    k: int,
    *,
    seed: int,
    ids: Sequence[str],
    init: Vectors | None = None,
    iterations: int = 2,
) -> Clusters:
    """Lloyd's k-means with k-means++ seeding (Arthur & Vassilvitskii 2007), both begun on a sample.

    Parameters
    ----------
    vectors : array (N, d)
        Finite rows; a memory map is read in blocks.
    k : int
        Clusters; at most the number of distinct rows, else fewer come back.
    seed : int
        Of the sample and the seeding.
    ids : sequence of str
        Of the rows: what is drawn follows from them, not from their order.
    init : array (k, d), optional
        Centroids to begin with; then nothing is drawn.
    iterations : int
        Passes of Lloyd over all rows, before the last assignment.

    Raises
    ------
    ValueError
        No rows, or k below 1.
    """
    if k < 1 or not len(vectors):
        raise ValueError(f"k-means needs rows and k >= 1, got {len(vectors)} rows and k = {k}")
    centroids = _begin(vectors, min(k, len(vectors)), seed, ids) if init is None else init.astype(np.float32)
    for _ in range(iterations):
        labels, _ = _assign(vectors, centroids)
        centroids = _means(vectors, labels, centroids)
    labels, distances = _assign(vectors, centroids)
    used = np.unique(labels)  # a cluster that lost its last member is left out
    labels = np.searchsorted(used, labels)
    return Clusters(centroids[used], labels.astype(np.int64), distances)


def nearest_rows(clusters: Clusters, ids: Sequence[str]) -> list[int]:
    """Row that stands for each cluster: the member nearest to its centroid, ties to the lowest id."""
    best: dict[int, int] = {}
    for i, cluster in enumerate(clusters.labels.tolist()):
        j = best.get(cluster)
        if j is None or (clusters.distances[i], ids[i]) < (clusters.distances[j], ids[j]):
            best[cluster] = i
    return [best[c] for c in range(len(clusters.centroids))]


def _begin(vectors: Vectors, k: int, seed: int, ids: Sequence[str]) -> Vectors:
    """Centroids of a sample of the rows."""
    draws = keyed_uniform(seed, "clusters/sample", ids)
    size = min(len(vectors), SAMPLE_PER_CLUSTER * k)
    chosen = np.argpartition(draws, size - 1)[:size]
    chosen = chosen[np.argsort(draws[chosen], kind="stable")]
    sample = np.ascontiguousarray(vectors[np.sort(chosen)][np.argsort(np.argsort(chosen))], dtype=np.float32)
    centroids = _spread(sample, k, seed)
    for _ in range(SAMPLE_ITERATIONS):
        labels, _ = _assign(sample, centroids)
        centroids = _means(sample, labels, centroids)
    return centroids


def _spread(sample: Vectors, k: int, seed: int) -> Vectors:
    """k-means++: each further centroid is drawn in proportion to its squared distance from those there are."""
    draws = uniform(seed, "clusters/spread", k).double().numpy()
    squares = (sample.astype(np.float64) ** 2).sum(axis=1)
    chosen = [int(draws[0] * len(sample))]
    nearest = np.full(len(sample), np.inf)
    for draw in draws[1:]:
        last = chosen[-1]
        nearest = np.minimum(nearest, np.maximum(squares + squares[last] - 2.0 * (sample @ sample[last]), 0.0))
        nearest[last] = 0.0
        total = np.cumsum(nearest)
        if total[-1] <= 0:  # no distinct row is left
            break
        chosen.append(int(np.searchsorted(total, draw * total[-1], side="right")))
    return sample[chosen].copy()


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(count, start + BLOCK)) for start in range(0, count, BLOCK))


def _assign(vectors: Vectors, centroids: Vectors) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Nearest centroid of every row, ties to the first, and the distance to it."""
    labels = np.empty(len(vectors), dtype=np.int64)
    distances = np.empty(len(vectors), dtype=np.float32)
    half = 0.5 * (centroids.astype(np.float64) ** 2).sum(axis=1).astype(np.float32)
    for block in _blocks(len(vectors)):
        rows = np.ascontiguousarray(vectors[block], dtype=np.float32)
        scores = rows @ centroids.T
        scores -= half
        labels[block] = scores.argmax(axis=1)
        best = scores[np.arange(len(rows)), labels[block]]
        distances[block] = np.sqrt(np.maximum(np.einsum("nd,nd->n", rows, rows) - 2.0 * best, 0.0))
    return labels, distances


def _means(vectors: Vectors, labels: npt.NDArray[np.int64], centroids: Vectors) -> Vectors:
    """Mean of every cluster's members; one without members stays where it is."""
    k = len(centroids)
    sums = np.zeros(centroids.shape, dtype=np.float64)
    for block in _blocks(len(vectors)):
        part = labels[block]
        ones = csr_matrix((np.ones(len(part), np.float32), (part, np.arange(len(part)))), shape=(k, len(part)))
        sums += ones @ np.ascontiguousarray(vectors[block], dtype=np.float32)
    counts = np.bincount(labels, minlength=k)
    held = counts > 0
    means = centroids.copy()
    means[held] = sums[held] / counts[held, None]
    return means
