"""Linear discriminants in closed form, with a shrunken covariance, and how well they do on rows they have not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from honeloom.errors import RowsError
from honeloom.mixture.evidence import Evidence, Gate
from honeloom.ops.noise import permutation

__all__ = ["Discriminant", "discriminant", "rows", "shrinkage_of", "validated"]

_TEMPERATURES = torch.logspace(-2, 3, 61, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Discriminant:
    """Scores x W^T + b of classes; softmax of them estimates their probabilities.

    Attributes
    ----------
    weight : Tensor
        (E, H), float64.
    bias : Tensor
        (E,), float64; zero where no intercept was asked for.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """(N, H) to (N, E)."""
        return vectors @ self.weight.T + self.bias


def rows(evidence: Evidence, *, shrinkage: float | None, folds: int, scale: float) -> Gate:
    """Tell apart what the router receives for the rows of each expert.

    Parameters
    ----------
    evidence : Evidence
        `vectors`, the row of each, and the expert of each row.
    shrinkage : float, optional
        Weight of the identity in the covariance, 0 to 1; None estimates it.
    folds : int
        Parts of the rows for cross-validation; vectors of one row stay together.
    scale : float
        Multiplier.

    Returns
    -------
    Gate
        `weight` (E, H), and `bias` (E,) where the evidence allows an intercept; float32.

    Raises
    ------
    RowsError
        An expert has no row.
    """
    if evidence.vectors is None or evidence.rows is None or evidence.labels is None:
        raise ValueError(f"{evidence.name}: needs vectors, their rows, and the labels of these")
    return fit(evidence, evidence.labels, shrinkage=shrinkage, folds=folds, scale=scale)


def fit(evidence: Evidence, labels: torch.Tensor, *, shrinkage: float | None, folds: int, scale: float) -> Gate:
    """The gate of labelled rows, with its cross-validated accuracy over vectors."""
    assert evidence.vectors is not None and evidence.rows is not None  # both callers have looked
    vectors, of_row = evidence.vectors.double(), evidence.rows
    counts = torch.bincount(labels, minlength=evidence.experts)
    if int(counts.min()) == 0:
        empty = counts.tolist().index(0)
        raise RowsError(
            f"{evidence.name}: no row belongs to expert {empty} (rows per expert: {counts.tolist()}), so there is "
            "nothing to tell it by; give rows of its domain"
        )
    targets = labels[of_row]
    accuracy = validated(vectors, targets, of_row, evidence, shrinkage=shrinkage, folds=folds)
    found = discriminant(vectors, targets, evidence.experts, intercept=evidence.intercept, shrinkage=shrinkage)
    tensors = {"weight": (found.weight * scale).float()}
    if evidence.intercept:
        tensors["bias"] = (found.bias * scale).float()
    largest = float(torch.bincount(targets, minlength=evidence.experts).max()) / len(targets)
    return Gate(tensors, accuracy, largest)


def validated(
    vectors: torch.Tensor, targets: torch.Tensor, of_row: torch.Tensor, evidence: Evidence,
    *, shrinkage: float | None, folds: int,
) -> float:  # fmt: skip
    """Share of the vectors whose class is found by a discriminant that has not seen their row."""
    rows_in_all = int(of_row.max()) + 1
    order = permutation(evidence.seed, "routing/folds", rows_in_all)
    labels = torch.zeros(rows_in_all, dtype=torch.int64)
    labels[of_row] = targets
    order = order[torch.argsort(labels[order], stable=True)]  # each class is spread over all folds
    fold = torch.empty(rows_in_all, dtype=torch.int64)
    fold[order] = torch.arange(rows_in_all) % folds
    right = 0
    for number in range(folds):
        held = fold[of_row] == number
        if not bool(held.any()) or bool(held.all()):
            continue
        seen = torch.unique(targets[~held])
        if len(seen) < 2:
            right += int((targets[held] == seen[0]).sum())
            continue
        found = discriminant(
            vectors[~held], targets[~held], evidence.experts, intercept=evidence.intercept, shrinkage=shrinkage
        )
        right += int((found.scores(vectors[held]).argmax(dim=1) == targets[held]).sum())
    return right / len(targets)


def discriminant(
    vectors: torch.Tensor, targets: torch.Tensor, classes: int, *, intercept: bool, shrinkage: float | None = None
) -> Discriminant:
    """Fit scores of classes in closed form.

    With an intercept: linear discriminant analysis, w_k = S^-1 m_k and b_k = -m_k^T S^-1 m_k / 2 + log p_k, with
    class means m_k seen from the mean of all vectors, shares p_k, and the pooled covariance S within classes. Without
    one: ridge regression of the classes' centred indicators on the vectors as they are, times the factor under which a
    softmax of it is likeliest. In both S, or the second moment, is shrunk towards a multiple of the identity.

    Parameters
    ----------
    vectors : Tensor
        (N, H), float64.
    targets : Tensor
        (N,) int64, the class of each vector.
    classes : int
        E; classes without a vector get the lowest score.
    intercept : bool
        Whether there is a bias.
    shrinkage : float, optional
        0 to 1; None estimates it.

    References
    ----------
    Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; Hoerl and Kennard 1970, doi:10.1080/00401706.1970.10488634;
    Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4.
    """
    counts = torch.bincount(targets, minlength=classes).double()
    indicators = torch.nn.functional.one_hot(targets, classes).double()
    if not intercept:
        return _ridge(vectors, targets, indicators, shrinkage)
    centre = vectors.mean(dim=0)
    moved = vectors - centre
    means = (indicators.T @ moved) / counts.clamp_min(1)[:, None]
    within = moved - means[targets]
    weight = _solve(within, means, shrinkage)
    bias = (counts / counts.sum()).log() - (weight * means).sum(dim=1) / 2
    bias = torch.where(counts > 0, bias - weight @ centre, bias[counts > 0].min() - 1e3)
    return Discriminant(weight, bias)


def _ridge(
    vectors: torch.Tensor, targets: torch.Tensor, indicators: torch.Tensor, shrinkage: float | None
) -> Discriminant:
    shares = indicators.mean(dim=0)
    wanted = (indicators - shares).T @ vectors / len(vectors)
    weight = _solve(vectors, wanted, shrinkage)
    scores = vectors @ weight.T
    losses = torch.stack([
        torch.nn.functional.cross_entropy(scores * t, targets, reduction="mean") for t in _TEMPERATURES
    ])  # fmt: skip
    return Discriminant(weight * _TEMPERATURES[int(losses.argmin())], torch.zeros(len(shares), dtype=torch.float64))


def _solve(vectors: torch.Tensor, sides: torch.Tensor, shrinkage: float | None) -> torch.Tensor:
    """Rows r of `sides` become ((1 - g) S + g m I)^-1 r with S = V^T V / n and m its mean eigenvalue."""
    count, width = vectors.shape
    share = shrinkage_of(vectors) if shrinkage is None else shrinkage
    mean = float(vectors.square().sum()) / (count * width)
    if mean == 0.0:  # every class is one point
        return sides
    share = max(share, 1e-8)  # a covariance of fewer vectors than dimensions has no inverse
    part, whole = (1 - share) / count, share * mean
    if count >= width:
        matrix = part * (vectors.T @ vectors)
        matrix.diagonal().add_(whole)
        return torch.cholesky_solve(sides.T, torch.linalg.cholesky(matrix)).T
    inner = part * (vectors @ vectors.T)
    inner.diagonal().add_(whole)  # Woodbury, in the space of the vectors
    solved = torch.cholesky_solve(vectors @ sides.T, torch.linalg.cholesky(inner)).T
    return (sides - part * (solved @ vectors)) / whole


def shrinkage_of(vectors: torch.Tensor) -> float:
    """The weight of the identity that Ledoit and Wolf estimate for V^T V / n, from centred vectors V (n, H); 0 to 1."""
    count, width = vectors.shape
    norms = vectors.square().sum(dim=1)
    mean = float(norms.sum()) / (count * width)
    square = float((vectors.T @ vectors if width <= count else vectors @ vectors.T).square().sum()) / count**2
    distance = square - width * mean**2
    noise = (float(norms.square().sum()) / count - square) / count
    return 0.0 if distance <= 0 or noise <= 0 else min(1.0, noise / distance)
