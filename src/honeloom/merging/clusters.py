"""Families of models that are alike enough to be merged, from a matrix of similarities in whatever order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from honeloom.errors import ConfigError

__all__ = ["ClusterMethod", "Clusters", "agglomerate", "find_clusters", "leader_clusters", "nearest_group"]

ClusterMethod = Literal["leader", "average", "complete"]
Array = npt.NDArray[np.float64]
Tree = tuple[tuple[int, int, float, int], ...]
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Clusters:
    """Models in groups.

    Attributes
    ----------
    groups : tuple of tuple of str
        Every model in one group. The largest first, of equal ones the first by name; members by name.
    leaders : tuple of str
        One per group: the model that founded it; of linkage, the member most similar to the others on average.
    method : {"leader", "average", "complete"}
        The rule.
    threshold : float
        Similarity above which models are alike.
    order : tuple of str
        All models with similar ones side by side, the groups in one piece each.
    linkage : tuple or None
        The merges of `scipy.cluster.hierarchy`, (N - 1) rows of (one, other, distance, members) where distance is 1
        minus similarity and item i < N is `order[i]`. Beside the leader rule it is the average linkage, to look at;
        None where that would tear a group apart.
    """

    groups: tuple[tuple[str, ...], ...]
    leaders: tuple[str, ...]
    method: ClusterMethod
    threshold: float
    order: tuple[str, ...]
    linkage: Tree | None = None


def find_clusters(names: Sequence[str], similarity: Array, threshold: float, method: ClusterMethod) -> Clusters:
    """`leader_clusters`, or `agglomerate` with that linkage."""
    if method == "leader":
        return leader_clusters(names, similarity, threshold)
    return agglomerate(names, similarity, threshold, method)


def leader_clusters(names: Sequence[str], similarity: Array, threshold: float = 0.95) -> Clusters:
    """The leader rule of Model-GLUE (arXiv:2410.05357), with an order of its own.

    The most central model comes first: that with the highest mean similarity to the others, of equal ones the first by
    name. Each joins the group whose leader it is most similar to, if that is strictly above the threshold (of equal
    ones the group founded first), or founds one. So no two leaders are alike, and every member is like its leader.

    Parameters
    ----------
    names : sequence of str
        N models, each once.
    similarity : ndarray
        (N, N), symmetric; the diagonal does not count.
    threshold : float
        From -1 to 1; 1 leaves every model alone.

    Raises
    ------
    ConfigError
        Names repeat, the matrix does not fit them, is not symmetric or not finite, or the threshold is out of range.
    """
    names, similarity = _canonical(names, similarity, threshold)
    central = _centrality(similarity)
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(names)), key=lambda i: (-central[i], i)):
        best = max(members, key=lambda leader: similarity[i, leader], default=None)
        if best is not None and similarity[i, best] > threshold:
            members[best].append(i)
        else:
            members[i] = [i]
    leaders = _largest_first(members)
    rows: Tree | None
    order, rows = _tree(similarity, "average")
    if not _in_one_piece(order, list(members.values())):
        rows = None
        order = [
            i for lead in leaders for i in sorted(members[lead], key=lambda i: (i != lead, -similarity[i, lead], i))
        ]
    return Clusters(
        tuple(tuple(names[i] for i in sorted(members[lead])) for lead in leaders),
        tuple(names[lead] for lead in leaders),
        "leader",
        threshold,
        tuple(names[i] for i in order),
        rows,
    )


def agglomerate(
    names: Sequence[str], similarity: Array, threshold: float, linkage: Literal["average", "complete"] = "average"
) -> Clusters:
    """Hierarchical clustering on 1 minus similarity, cut where two groups are no more than the threshold alike.

    Parameters
    ----------
    names, similarity, threshold
        As for `leader_clusters`.
    linkage : {"average", "complete"}
        How alike two groups are: the mean over all pairs across (UPGMA), or the least alike pair. With "complete" any
        two members of a group are alike.

    Raises
    ------
    ConfigError
        As for `leader_clusters`.
    """
    names, similarity = _canonical(names, similarity, threshold)
    order, rows = _tree(similarity, linkage)
    members = {min(group): group for group in _cut(similarity, linkage, 1.0 - threshold)}
    leaders = {}
    for first, group in members.items():
        central = _centrality(similarity[np.ix_(group, group)])
        leaders[first] = group[max(range(len(group)), key=lambda i: (central[i], -i))]
    groups = _largest_first(members)
    return Clusters(
        tuple(tuple(names[i] for i in members[g]) for g in groups),
        tuple(names[leaders[g]] for g in groups),
        linkage,
        threshold,
        tuple(names[i] for i in order),
        rows,
    )


def nearest_group(names: Sequence[str], similarity: Array, clusters: Clusters, name: str) -> tuple[int, float] | None:
    """The other group that a model's group is most similar to, by the rule that made them.

    Parameters
    ----------
    names, similarity
        Of the clustering.
    clusters : Clusters
        Its result.
    name : str
        A model.

    Returns
    -------
    (int, float) or None
        Index of the group and the similarity: between leaders, or by the linkage. None if there is one group.
    """
    at = {n: i for i, n in enumerate(names)}
    own = next(g for g, group in enumerate(clusters.groups) if name in group)
    found = [(g, _between(similarity, at, clusters, own, g)) for g in range(len(clusters.groups)) if g != own]
    return max(found, key=lambda pair: (pair[1], -pair[0])) if found else None


def _between(similarity: Array, at: dict[str, int], clusters: Clusters, one: int, other: int) -> float:
    if clusters.method == "leader":
        return float(similarity[at[clusters.leaders[one]], at[clusters.leaders[other]]])
    across = similarity[np.ix_(*([at[n] for n in clusters.groups[g]] for g in (one, other)))]
    return float(across.mean() if clusters.method == "average" else across.min())


def _canonical(names: Sequence[str], similarity: Array, threshold: float) -> tuple[list[str], Array]:
    """Checked, and in the order of the names, so that the order of the input cannot matter."""
    similarity = np.asarray(similarity, np.float64)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"clusters need names that differ, got {', '.join(names) or 'none'}")
    if similarity.shape != (len(names), len(names)):
        raise ConfigError(f"similarities have shape {similarity.shape}; {len(names)} models need a square of them")
    inside = np.isfinite(similarity).all() and np.abs(similarity).max() <= 1 + _ROUNDING
    if not inside or not np.allclose(similarity, similarity.T, rtol=0, atol=_ROUNDING):
        raise ConfigError(
            "similarities must lie between -1 and 1 and be the same both ways; measure them with measure_similarity"
        )
    if not -1.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold is {threshold}; a similarity lies between -1 and 1")
    order = sorted(range(len(names)), key=lambda i: names[i])
    similarity = similarity[np.ix_(order, order)]
    return [names[i] for i in order], np.maximum(similarity, similarity.T)


def _centrality(similarity: Array) -> list[float]:
    """Sum of the similarities to the others, rounded once: models of like rows tie exactly."""
    return [fsum(np.delete(row, i)) for i, row in enumerate(similarity)]


def _largest_first(members: dict[int, list[int]]) -> list[int]:
    """Keys of groups, the largest first, of equal ones that with the first member."""
    return sorted(members, key=lambda key: (-len(members[key]), min(members[key])))


def _merges(similarity: Array, linkage: str) -> Array:
    distance = 1.0 - similarity
    np.fill_diagonal(distance, 0.0)
    merges: Array = hierarchy.linkage(squareform(distance, checks=False), linkage, optimal_ordering=True)
    return merges


def _tree(similarity: Array, linkage: str) -> tuple[list[int], Tree]:
    """Models with similar ones side by side, and the merges of the linkage by places in that order."""
    if len(similarity) == 1:
        return [0], ()
    merges = _merges(similarity, linkage)
    order: list[int] = hierarchy.leaves_list(merges).tolist()
    place = {model: i for i, model in enumerate(order)}
    rows = []
    for one, other, height, count in merges.tolist():
        low, high = sorted(place.get(int(k), int(k)) for k in (one, other))
        rows.append((low, high, float(height), int(count)))
    return order, tuple(rows)


def _in_one_piece(order: Sequence[int], groups: Sequence[Sequence[int]]) -> bool:
    """Whether the members of every group stand side by side."""
    place = {model: i for i, model in enumerate(order)}
    return all(max(at) - min(at) + 1 == len(at) for at in ([place[i] for i in group] for group in groups))


def _cut(similarity: Array, linkage: str, distance: float) -> list[list[int]]:
    """Groups that are joined strictly below a distance, members in order."""
    if len(similarity) == 1:
        return [[0]]
    merges = _merges(similarity, linkage)
    label = hierarchy.fcluster(merges, np.nextafter(distance, -np.inf), criterion="distance")
    return [np.flatnonzero(label == group).tolist() for group in np.unique(label)]
