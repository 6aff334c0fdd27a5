"""Groups of rows without labels: k-means, then each group to the expert that knows it best."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

from honeloom.errors import RowsError
from honeloom.mixture.discriminants import fit
from honeloom.mixture.evidence import Evidence, Gate
from honeloom.ops.noise import uniform

__all__ = ["assigned", "clusters", "kmeans"]

_ROUNDS = 100


def clusters(evidence: Evidence, *, shrinkage: float | None, folds: int, restarts: int, scale: float) -> Gate:
    """Tell apart groups of rows that k-means finds, each given to one expert.

    Parameters
    ----------
    evidence : Evidence
        `vectors` with the row of each; `pooled` (R, P), by which the rows are grouped; `losses` (R, E).
    shrinkage, folds, scale
        As in `rows`.
    restarts : int
        Beginnings of k-means.

    Returns
    -------
    Gate
        As `rows` gives it.

    References
    ----------
    Gururangan et al. 2023, arXiv:2303.14177, section 2: groups of one corpus, an expert for each.
    """
    if evidence.vectors is None or evidence.rows is None or evidence.pooled is None or evidence.losses is None:
        raise ValueError(f"{evidence.name}: needs vectors with their rows, pooled vectors, and losses")
    groups = kmeans(evidence.pooled, evidence.experts, seed=evidence.seed, restarts=restarts)
    return fit(evidence, assigned(groups, evidence.losses), shrinkage=shrinkage, folds=folds, scale=scale)


def assigned(groups: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """The expert of every row: one per group, so that the losses of all rows sum to the least.

    Parameters
    ----------
    groups : Tensor
        (R,) int64, the group of each row, below E.
    losses : Tensor
        (R, E).

    Returns
    -------
    Tensor
        (R,) int64.
    """
    experts = losses.shape[1]
    sums = torch.zeros(experts, experts, dtype=torch.float64).index_add_(0, groups, losses.double())
    _, columns = linear_sum_assignment(sums.numpy())
    return torch.as_tensor(columns, dtype=torch.int64)[groups]


def kmeans(vectors: torch.Tensor, groups: int, *, seed: int, restarts: int) -> torch.Tensor:
    """Group vectors by direction, seen from their mean; seeded, the best of several beginnings.

    Parameters
    ----------
    vectors : Tensor
        (R, P).
    groups : int
        How many; at most R.
    seed : int
        Of the beginnings (k-means++).
    restarts : int
        How many of these.

    Returns
    -------
    Tensor
        (R,) int64; groups are numbered by the first row that is in them.

    References
    ----------
    Lloyd 1982, doi:10.1109/TIT.1982.1056489; Arthur and Vassilvitskii 2007, doi:10.5555/1283383.1283494.
    """
    if len(vectors) < groups:
        raise RowsError(f"{len(vectors)} rows cannot be cut into {groups} groups; give more rows")
    points = vectors.double() - vectors.double().mean(dim=0)
    points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
    best, least = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for number in range(restarts):
        found, inertia = _lloyd(points, _beginning(points, groups, uniform(seed, f"kmeans/{number}", groups)))
        if inertia < least * (1 - 1e-12):
            best, least = found, inertia
    firsts = list(dict.fromkeys(best.tolist()))
    places = torch.full((groups,), -1, dtype=torch.int64)
    places[torch.tensor(firsts)] = torch.arange(len(firsts))
    return places[best]


def _beginning(points: torch.Tensor, groups: int, draws: torch.Tensor) -> torch.Tensor:
    """Centres drawn one by one, each with a probability by the squared distance from those before it."""
    chosen = [min(int(draws[0] * len(points)), len(points) - 1)]
    nearest = torch.full((len(points),), float("inf"), dtype=torch.float64)
    for draw in draws[1:]:
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(dim=1))
        total = nearest.cumsum(0)
        chosen.append(min(int(torch.searchsorted(total, draw * total[-1], right=True)), len(points) - 1))
    return points[chosen]


def _lloyd(points: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The group of each point, and the sum of squared distances."""
    found = torch.full((len(points),), -1, dtype=torch.int64)
    for _ in range(_ROUNDS):
        distances = centres.square().sum(dim=1) - 2 * points @ centres.T
        nearest = distances.argmin(dim=1)
        if torch.equal(nearest, found):
            break
        found = nearest
        for group in range(len(centres)):
            if bool((found == group).any()):
                centres[group] = points[found == group].mean(dim=0)
    return found, float((points - centres[found]).square().sum())
