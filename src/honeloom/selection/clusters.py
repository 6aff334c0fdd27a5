"""k-means at any size: seeded on a sample, assigned in pieces.

Seeding one centroid after another over all rows costs more than all of Lloyd's iterations, and
most of these only move the centroids into place. So the seeds are chosen among a few rows per
cluster, moved into place on a sample, and the rows themselves are passed twice, in blocks: they
may be a memory map larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from honeloom.ops.noise import keyed_uniform, uniform

__all__ = ["Clusters", "kmeans"]

Vectors = npt.NDArray[np.float32]
BLOCK = 4096
"""Rows that are read at a time."""
SCORES = 1 << 20
"""Scores of one matrix product: few enough to stay in a core's cache until their maximum is found."""
SEEDS_PER_CLUSTER, SAMPLE_PER_CLUSTER, SAMPLE_LEAST = 8, 20, 4096
SAMPLE_ITERATIONS = 5
SEEDS_AT_ONCE = 16
ROUNDING = 1e-6


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


def kmeans(
    vectors: Vectors,
    k: int,
    *,
    seed: int,
    ids: Sequence[str],
    init: Vectors | None = None,
    iterations: int = 2,
) -> Clusters:
    """Lloyd's k-means with greedy k-means++ seeding, both begun on a sample of the rows.

    The centroids that come back are the means of their members; a row is in the cluster whose
    centroid was nearest before these means were taken.

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
        Passes of Lloyd over all rows; 0 assigns the rows to the centroids there are.

    Raises
    ------
    ValueError
        No rows, or k below 1.

    Notes
    -----
    O(N k d) per pass and O(k^2 d log k) for the seeding; beside the rows, memory is O(k d + N).

    References
    ----------
    Arthur and Vassilvitskii 2007 (k-means++, and its greedy form).
    """
    if k < 1 or not len(vectors):
        raise ValueError(f"k-means needs rows and k >= 1, got {len(vectors)} rows and k = {k}")
    centroids = _begin(vectors, min(k, len(vectors)), seed, ids) if init is None else init.astype(np.float32)
    labels = _assign(vectors, centroids) if not iterations else np.empty(0, dtype=np.int64)
    for _ in range(iterations):
        labels = _assign(vectors, centroids)
        centroids = _means(vectors, labels, centroids)
    used, labels = np.unique(labels, return_inverse=True)  # a cluster without members is left out
    centroids = centroids[used]
    return Clusters(centroids, labels.astype(np.int64), _distances(vectors, labels, centroids))


def _begin(vectors: Vectors, k: int, seed: int, ids: Sequence[str]) -> Vectors:
    """Centroids of a sample of the rows."""
    draws = keyed_uniform(seed, "clusters/sample", ids)
    size = min(len(vectors), max(SAMPLE_PER_CLUSTER * k, SAMPLE_LEAST))
    chosen = np.argpartition(draws, size - 1)[:size]
    chosen = chosen[np.argsort(draws[chosen], kind="stable")]
    ascending = np.argsort(chosen)  # a memory map is read from its beginning to its end
    sample = np.empty((size, vectors.shape[1]), dtype=np.float32)
    sample[ascending] = vectors[chosen[ascending]]
    centroids = _spread(sample[: max(SEEDS_PER_CLUSTER * k, SAMPLE_LEAST // 4)], k, seed)
    for _ in range(SAMPLE_ITERATIONS):
        centroids = _means(sample, _assign(sample, centroids), centroids)
    return centroids


def _spread(sample: Vectors, k: int, seed: int) -> Vectors:
    """Greedy k-means++: of 2 + ln k rows, drawn by their squared distance from the seeds, take the one that helps most.

    Rows are drawn and their distances computed for several seeds at once, as one matrix
    product. A row that was drawn by a distance which has shrunk since is kept with the
    probability new / old, so that the law is that of drawing one after another.
    """
    trials, used = 2 + int(np.log(k)), 1
    squares = np.einsum("nd,nd->n", sample, sample)
    chosen = [int(uniform(seed, "clusters/spread", 1)[0] * len(sample))]
    nearest = _squared(sample, squares, chosen)[0]
    while len(chosen) < k:
        total = np.cumsum(nearest, dtype=np.float64)
        if total[-1] <= 0:  # no distinct row is left
            break
        count = trials * min(SEEDS_AT_ONCE, len(chosen), k - len(chosen))
        draws = uniform(seed, "clusters/spread", 2 * count, start=used).numpy().reshape(2, count)
        used += draws.size
        drawn = np.minimum(np.searchsorted(total, draws[0] * total[-1], side="right"), len(sample) - 1)
        reach = _squared(sample, squares, drawn)
        limits = draws[1] * nearest[drawn]
        first = 0
        while first < count and len(chosen) < k:
            left = first + np.flatnonzero(limits[first:] < nearest[drawn[first:]])[:trials]
            if not len(left):
                break
            first = int(left[-1]) + 1
            reached = np.minimum(reach[left], nearest)
            best = int(reached.sum(axis=1).argmin())
            chosen.append(int(drawn[left[best]]))
            nearest = reached[best]
    return sample[chosen]


def _squared(sample: Vectors, squares: Vectors, chosen: Sequence[int] | npt.NDArray[np.int64]) -> Vectors:
    """Squared distances (t, n) of all rows from t of them; 0 where rounding is all there is."""
    found = sample[chosen] @ sample.T
    found *= -2.0
    found += squares
    found += squares[chosen, None]
    found[found <= ROUNDING * squares] = 0.0
    return found


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(count, start + size)) for start in range(0, count, size))


def _assign(vectors: Vectors, centroids: Vectors) -> npt.NDArray[np.int64]:
    """Nearest centroid of every row, ties to the first."""
    labels = np.empty(len(vectors), dtype=np.int64)
    half = 0.5 * np.einsum("kd,kd->k", centroids, centroids)
    size = max(64, min(BLOCK, SCORES // len(centroids)))
    turned = np.ascontiguousarray(centroids.T)
    held = np.empty((size, len(centroids)), dtype=np.float32)
    for block in _blocks(len(vectors), size):
        rows = np.asarray(vectors[block], dtype=np.float32)
        scores = np.matmul(rows, turned, out=held[: len(rows)])
        scores -= half
        labels[block] = scores.argmax(axis=1)
    return labels


def _distances(vectors: Vectors, labels: npt.NDArray[np.int64], centroids: Vectors) -> Vectors:
    """Distance (N,) of every row to the centroid of its cluster."""
    found = np.empty(len(vectors), dtype=np.float32)
    for block in _blocks(len(vectors), BLOCK):
        gap = centroids[labels[block]]
        gap -= vectors[block]
        found[block] = np.sqrt(np.einsum("nd,nd->n", gap, gap))
    return found


def _means(vectors: Vectors, labels: npt.NDArray[np.int64], centroids: Vectors) -> Vectors:
    """Mean of every cluster's members; one without members stays where it is."""
    k = len(centroids)
    sums = np.zeros(centroids.shape, dtype=np.float64)
    for block in _blocks(len(vectors), BLOCK):
        part = labels[block]
        ones = csr_matrix((np.ones(len(part), np.float32), (part, np.arange(len(part)))), shape=(k, len(part)))
        sums += ones @ np.asarray(vectors[block], dtype=np.float32)
    counts = np.bincount(labels, minlength=k)
    held = counts > 0
    means = centroids.copy()
    means[held] = sums[held] / counts[held, None]
    return means
