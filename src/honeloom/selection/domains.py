"""Domains of rows whose domain nobody labelled: centroids, their number, and diversity within and between them.

Everything here is a function of vectors of length 1; a zero vector belongs to no domain, and its
cosine with anything is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_mutual_info_score

from honeloom.ops.noise import keyed_uniform
from honeloom.selection.clusters import Clusters, kmeans
from honeloom.selection.vectors import blocks_of, inverse_lengths
from honeloom.types.ports import Vectors

__all__ = [
    "Domains", "Spread", "Stability", "centroids_of", "constrained_kmeans", "cosines", "discover", "diversity",
    "find_domains", "labelled_domains", "nearest", "set_diversity", "stable_count",
]  # fmt: skip

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

ITERATIONS = 50
SAMPLE = 3000
"""Rows among which the number of domains is sought, and starts of k-means are compared."""
MOST_DOMAINS = 16
STARTS, STARTS_OF_PART = 8, 3
SPLITS = 8
"""Random halvings of the sample that every candidate number is tried on."""
FEWEST_ROWS = 2
"""Rows per domain of a third of the sample below which a number of domains is not tried."""
DIGITS = 12
"""Cosines are rounded to this, so that the order in which rows are summed does not show."""


@dataclass(frozen=True, slots=True)
class Domains:
    """A partition of N rows into K domains.

    Attributes
    ----------
    centroids : array (K, d), float64
        Mean of the members, seed rows included; no length is prescribed.
    labels : array (N,)
        Domain of every row; -1 for a zero vector.
    names : tuple of str
        Of the domains.
    dropped : tuple of str
        Names of domains without a row, which were left out.
    """

    centroids: Values
    labels: Labels
    names: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many domains there are."""
        return len(self.names)

    def warning(self) -> str | None:
        """What a person must know about domains that were left out; None where none was."""
        if not self.dropped:
            return None
        return (
            f"no row is nearest to {len(self.dropped)} of {self.count + len(self.dropped)} domains "
            f"({', '.join(self.dropped)}); they are left out"
        )


@dataclass(frozen=True, slots=True)
class Stability:
    """How well clusterings of two halves agree on rows of neither, by number of clusters.

    Attributes
    ----------
    counts : tuple of int
        Numbers of clusters that were tried, ascending.
    agreement, stderr : tuple of float
        Mean adjusted mutual information over the halvings, at most 1, and its standard error.
    best : int
        The number that is taken; 1 where none could be tried.
    """

    counts: tuple[int, ...]
    agreement: tuple[float, ...]
    stderr: tuple[float, ...]
    best: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Diversity of a set of rows.

    Attributes
    ----------
    inter : float
        Mean Euclidean distance between two domains' centroids, in [0, 2]; 0 for one domain.
    intra : tuple of float
        Per domain the mean Euclidean distance of its rows to the centroid, in [0, 2].
    """

    inter: float
    intra: tuple[float, ...]


def centroids_of(vectors: Vectors, labels: Labels, count: int) -> Values:
    """Mean vector (count, d) of every label's rows, summed in float64; zeros for a label without rows.

    A label of -1 is passed over.
    """
    sums = np.zeros((count, vectors.shape[1]))
    sizes = np.bincount(labels[labels >= 0], minlength=count)
    for part in blocks_of(len(vectors)):
        rows, mine = np.asarray(vectors[part], dtype=np.float64), labels[part]
        for k in np.unique(mine[mine >= 0]):
            sums[k] += rows[mine == k].sum(axis=0)
    return sums / np.maximum(sizes, 1)[:, None]


def cosines(vectors: Vectors, centroids: Values) -> Iterator[tuple[slice, Values]]:
    """Cosines (n, K) of the rows with the centroids, a block at a time; 0 where either is zero."""
    scaled = _scaled(centroids)
    for part in blocks_of(len(vectors)):
        yield part, np.round(_scaled(np.asarray(vectors[part], dtype=np.float64)) @ scaled.T, DIGITS)


def _scaled(rows: Values) -> Values:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Values = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return scaled


def constrained_kmeans(
    vectors: Vectors, centroids: Values, names: Sequence[str], *, seeds: Vectors | None = None,
    seed_labels: Labels | None = None,
) -> Domains:  # fmt: skip
    """Spherical k-means from given centroids, in which seed rows keep their domain and the others move.

    Parameters
    ----------
    vectors : array (N, d)
        Rows of length 1 or 0; a memory map is read in blocks.
    centroids : array (K, d)
        Where to begin.
    names : sequence of str
        Of the K domains.
    seeds, seed_labels : arrays (m, d) and (m,), optional
        Rows whose domain is given; they take part in the means.

    Returns
    -------
    Domains
        At a fixed point, or after 50 passes. A domain no row is nearest to is left out,
        however many seeds it has.

    Raises
    ------
    ValueError
        No row has a vector.

    References
    ----------
    Basu, Banerjee and Mooney 2002 (constrained k-means); Ling et al. 2025, arXiv:2502.04380.
    """
    held = np.zeros((0, vectors.shape[1]), np.float32) if seeds is None else seeds
    given = np.zeros(0, np.int64) if seed_labels is None else seed_labels
    labels = nearest(vectors, centroids)
    if not (labels >= 0).any():
        raise ValueError("no row has a vector")
    for _ in range(ITERATIONS):
        centroids = _joint_means(vectors, labels, held, given, centroids)
        moved = nearest(vectors, centroids)
        if np.array_equal(moved, labels):
            break
        labels = moved
    used, place = np.unique(labels[labels >= 0], return_inverse=True)
    final = np.full(len(labels), -1, dtype=np.int64)
    final[labels >= 0] = place
    dropped = tuple(name for k, name in enumerate(names) if k not in set(used.tolist()))
    return Domains(centroids[used], final, tuple(names[k] for k in used), dropped)


def nearest(vectors: Vectors, centroids: Values) -> Labels:
    """Domain (N,) whose centroid (K, d) has the largest cosine with the row, ties to the first; -1 for a zero row."""
    labels = np.empty(len(vectors), dtype=np.int64)
    for part, found in cosines(vectors, centroids):
        usable = np.asarray(vectors[part]).any(axis=1)
        labels[part] = np.where(usable, found.argmax(axis=1), -1)
    return labels


def _joint_means(vectors: Vectors, labels: Labels, seeds: Vectors, given: Labels, before: Values) -> Values:
    """Means of rows and seeds together; a domain without either stays where it is."""
    count = len(before)
    sizes = [np.bincount(lab[lab >= 0], minlength=count) for lab in (labels, given)]
    sums = centroids_of(vectors, labels, count) * sizes[0][:, None]
    sums += centroids_of(seeds, given, count) * sizes[1][:, None]
    total = sizes[0] + sizes[1]
    return np.where((total > 0)[:, None], sums / np.maximum(total, 1)[:, None], before)


def find_domains(vectors: Vectors, count: int, *, ids: Sequence[str], seed: int) -> Domains:
    """`count` domains of rows (N, d) by k-means from the best of several starts on a sample.

    Domains are numbered by size, the largest first. Fewer than `count` come back where rows repeat.
    """
    chosen = _sample(vectors, ids, seed)
    sample = np.asarray(vectors[chosen], dtype=np.float32)
    centroids = _best_start(sample, count, [ids[i] for i in chosen], seed, STARTS).centroids.astype(np.float64)
    found = constrained_kmeans(vectors, centroids, [str(k) for k in range(len(centroids))])
    order = np.argsort(-np.bincount(found.labels[found.labels >= 0], minlength=found.count), kind="stable")
    place = np.empty(found.count + 1, dtype=np.int64)
    place[order], place[-1] = np.arange(found.count), -1
    return Domains(found.centroids[order], place[found.labels], tuple(f"domain-{k}" for k in range(found.count)))


def _best_start(sample: Vectors, count: int, ids: Sequence[str], seed: int, starts: int) -> Clusters:
    """The k-means with the lowest sum of squares."""
    tried = [kmeans(sample, count, seed=seed * STARTS + s, ids=ids, iterations=8) for s in range(starts)]
    return min(tried, key=lambda found: float((found.distances.astype(np.float64) ** 2).sum()))


def stable_count(vectors: Vectors, *, ids: Sequence[str], seed: int, most: int = MOST_DOMAINS) -> Stability:
    """Seek the number of clusters that two halves of the rows agree on best.

    A sample of at most 3,000 rows is cut in three at random, eight times over. For every number
    from 2 to `most`, the first two parts are clustered each for itself, and the third is
    labelled by the nearest centroids of either. The more the two labellings agree beyond
    chance, the less the number is an accident of the rows.

    Returns
    -------
    Stability
        `best` has the highest agreement squared times 1 - 1 / K, the share of pairs of rows that
        K even clusters tell apart: few clusters agree easily, so that agreement alone would
        favour two, and say little.

    References
    ----------
    Lange, Roth, Braun and Buhmann 2004, doi:10.1162/089976604773717621; Vinh, Epps and Bailey
    2010 (adjusted mutual information).
    """
    chosen = _sample(vectors, ids, seed)
    sample = np.asarray(vectors[chosen], dtype=np.float32)
    names = [ids[i] for i in chosen]
    top = min(most, len(sample) // (3 * FEWEST_ROWS))
    counts = tuple(range(2, top + 1))
    if not counts or len(np.unique(sample, axis=0)) < 2:
        return Stability((), (), (), 1)
    tried = np.array([[_agreement(sample, names, k, seed, s) for s in range(SPLITS)] for k in counts])
    mean, error = tried.mean(axis=1), tried.std(axis=1, ddof=1) / math.sqrt(SPLITS)
    told_apart = 1.0 - 1.0 / np.array(counts)
    best = int(np.argmax(np.maximum(mean, 0.0) ** 2 * told_apart))
    return Stability(counts, tuple(mean.tolist()), tuple(error.tolist()), counts[best])


def _agreement(sample: Vectors, names: Sequence[str], count: int, seed: int, split: int) -> float:
    draws = keyed_uniform(seed, f"domains/split-{split}", names)
    order = np.argsort(draws, kind="stable")
    parts = np.array_split(order, 3)
    labels = []
    for part in parts[:2]:
        found = _best_start(sample[part], count, [names[i] for i in part], seed, STARTS_OF_PART)
        labels.append(nearest(sample[parts[2]], found.centroids.astype(np.float64)))
    return float(adjusted_mutual_info_score(*labels))


def _sample(vectors: Vectors, ids: Sequence[str], seed: int) -> Labels:
    """Places of at most 3,000 rows that have a vector, in the order of a draw by id."""
    draws = keyed_uniform(seed, "domains/sample", ids)
    order = np.argsort(draws, kind="stable")[: 2 * SAMPLE]
    usable = inverse_lengths(vectors[np.sort(order)])[np.argsort(np.argsort(order))] > 0
    found: Labels = order[usable][:SAMPLE]
    return found


def diversity(vectors: Vectors, domains: Domains) -> tuple[Values, Values]:
    """Inter- and intra-diversity of every row, (N,) each.

    phi_inter is the sum of the row's cosines with the centroids of the other domains, phi_intra
    its cosine with its own. With one domain phi_inter is the empty sum, 0; a zero vector has 0
    for both.

    References
    ----------
    Ling et al. 2025, arXiv:2502.04380, section 3.
    """
    inter, intra = np.zeros(len(vectors)), np.zeros(len(vectors))
    for part, found in cosines(vectors, domains.centroids):
        mine = domains.labels[part]
        known = mine >= 0
        own = np.where(known, found[np.arange(len(mine)), np.maximum(mine, 0)], 0.0)
        intra[part] = own
        others = found * (np.arange(domains.count) != mine[:, None])  # a row of no domain is a zero row: all are 0
        inter[part] = np.round(others.sum(axis=1), DIGITS)
    return inter, intra


def discover(vectors: Vectors, count: int | None, *, ids: Sequence[str], seed: int) -> tuple[Domains, Stability | None]:
    """Domains of rows about which nothing is known: `count` of them, else as many as `stable_count` says."""
    stability = stable_count(vectors, ids=ids, seed=seed) if count is None else None
    wanted = stability.best if stability is not None else count
    return find_domains(vectors, wanted or 1, ids=ids, seed=seed), stability


def labelled_domains(vectors: Vectors, labels: Sequence[str | None]) -> Domains:
    """Domains that labels give, in the labels' order; rows without a label are one of their own, "(none)"."""
    given = np.array([label or "(none)" for label in labels])
    names, place = np.unique(given, return_inverse=True)
    found = np.where(inverse_lengths(vectors) > 0, place, -1).astype(np.int64)
    used, found[found >= 0] = np.unique(found[found >= 0], return_inverse=True)
    dropped = tuple(str(n) for k, n in enumerate(names) if k not in set(used.tolist()))
    return Domains(centroids_of(vectors, found, len(used)), found, tuple(str(names[k]) for k in used), dropped)


def set_diversity(vectors: Vectors, labels: Labels, count: int) -> Spread:
    """Diversity of a whole set of rows (N, d), from the means of its own domains."""
    middles = centroids_of(vectors, labels, count)
    present = np.bincount(labels[labels >= 0], minlength=count) > 0
    held = middles[present]
    gaps = [float(np.linalg.norm(a - b)) for i, a in enumerate(held) for b in held[:i]]
    sums, sizes = np.zeros(count), np.zeros(count)
    for part in blocks_of(len(vectors)):
        rows, mine = np.asarray(vectors[part], dtype=np.float64), labels[part]
        rows, mine = rows[mine >= 0], mine[mine >= 0]
        sums += np.bincount(mine, np.linalg.norm(rows - middles[mine], axis=1), minlength=count)
        sizes += np.bincount(mine, minlength=count)
    intra = sums / np.maximum(sizes, 1)
    return Spread(float(np.mean(gaps)) if gaps else 0.0, tuple(intra.tolist()))
