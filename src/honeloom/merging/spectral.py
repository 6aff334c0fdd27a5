"""Merging by singular vectors."""

from __future__ import annotations

import torch

from honeloom.merging.engine.matrices import Whole, read_matrix
from honeloom.merging.engine.tensors import Merged, Read, Rule, Tensors, WeightedSum

__all__ = ["iso_c", "tsv_m"]


def _plan_tsv_m(tensors: Tensors, *, scale: float = 1.0) -> Merged:
    """Join the leading singular vectors of the task vectors, made orthogonal to each other.

    Of each (m, n) task vector the first min(m, n) // K singular triplets are kept, at least one. The left vectors of
    all are replaced by the nearest orthonormal ones (the polar factor), and so are the right ones.

    Parameters
    ----------
    tensors : Tensors
        K models and their base. The weights multiply the task vectors first; the paper has none.
    scale : float
        Multiplier on the merged task vector.

    Returns
    -------
    callable
        Elements start..stop of the result, float64. For tensors that are no matrices, the base plus scale times the
        mean of the task vectors. Triplets with a singular value of rounding size are left out, and so are directions
        that the vectors of several models share but for rounding.

    Raises
    ------
    ConfigError
        No base.

    References
    ----------
    Gargiulo et al. 2025, arXiv:2412.00081.
    """
    if len(tensors.shape) != 2:
        return _mean(tensors, scale)
    return Whole(lambda: _added(tensors, _joined(tensors), scale))


def _plan_iso_c(tensors: Tensors, *, scale: float = 1.0) -> Merged:
    """Add the task vectors up and set all singular values of the sum to their mean.

    Parameters
    ----------
    tensors : Tensors
        K models and their base. The weights multiply the task vectors first; the paper has none.
    scale : float
        Multiplier on the merged task vector.

    Returns
    -------
    callable
        Elements start..stop of the result, float64. For tensors that are no matrices, the base plus scale times the
        mean of the task vectors.

    Raises
    ------
    ConfigError
        No base.

    References
    ----------
    Marczak et al. 2025, arXiv:2502.04959.
    """
    if len(tensors.shape) != 2:
        return _mean(tensors, scale)
    return Whole(lambda: _added(tensors, _isotropic(tensors), scale))


tsv_m = Rule(_plan_tsv_m, needs_base=True)
"""Leading singular directions of each task vector, made orthogonal to the other models'."""
iso_c = Rule(_plan_iso_c, needs_base=True)
"""Sum of the task vectors with all singular values set to their mean."""


def _mean(tensors: Tensors, scale: float) -> Merged:
    factors = tuple(scale * weight / len(tensors.weights) for weight in tensors.weights)
    return WeightedSum(tensors, factors, from_base=True)


def _added(tensors: Tensors, change: torch.Tensor, scale: float) -> torch.Tensor:
    return change.mul_(scale).add_(read_matrix(tensors.origin, *change.shape))


def _joined(tensors: Tensors) -> torch.Tensor:
    kept = max(1, min(tensors.shape) // len(tensors.models))
    lefts, values, rights = [], [], []
    for read, weight in zip(tensors.models, tensors.weights, strict=True):
        left, sizes, right = _triplets(_task_matrix(tensors, read, weight), kept)
        count = _rank(sizes, max(tensors.shape))
        lefts.append(left[:, :count])
        values.append(sizes[:count])
        rights.append(right[:, :count])
    left, right = _orthonormal(torch.cat(lefts, dim=1)), _orthonormal(torch.cat(rights, dim=1))
    return (left * torch.cat(values)) @ right.T


def _isotropic(tensors: Tensors) -> torch.Tensor:
    total = torch.zeros(tensors.shape, dtype=torch.float64)
    for read, weight in zip(tensors.models, tensors.weights, strict=True):
        total += _task_matrix(tensors, read, weight)
    left, sizes, right = _triplets(total, min(total.shape))
    return (left @ right.T).mul_(float(sizes.mean()) if len(sizes) else 0.0)


def _task_matrix(tensors: Tensors, read: Read, weight: float) -> torch.Tensor:
    rows, columns = tensors.shape
    return read_matrix(lambda start, stop: (read(start, stop) - tensors.origin(start, stop)) * weight, rows, columns)


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """Polar factor of (m, r): the nearest matrix with orthonormal columns, within the span of the given ones."""
    left, sizes, right = _triplets(vectors, min(vectors.shape))
    rank = _rank(sizes, max(vectors.shape))
    return left[:, :rank] @ right[:, :rank].T


def _triplets(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular vectors and values of (m, n): (m, count), (count,) descending, (n, count).

    The eigenvectors of the smaller Gram matrix take a third of the time of a singular value decomposition, and lose
    twice the digits that the values span: they serve where all values are above 1e-4 of the first.
    """
    rows, columns = matrix.shape
    wide = matrix if rows <= columns else matrix.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, one = squares.flip(0)[:count], vectors.flip(1)[:, :count]
    if len(squares) and float(squares[-1]) > 1e-8 * float(squares[0]):
        sizes = squares.sqrt()
        other = (wide.T @ one).div_(sizes)
    else:
        one, sizes, transposed = torch.linalg.svd(wide, full_matrices=False)
        one, sizes, other = one[:, :count], sizes[:count], transposed[:count].T
    return (one, sizes, other) if rows <= columns else (other, sizes, one)


def _rank(values: torch.Tensor, size: int) -> int:
    """Singular values above rounding, as numpy's `matrix_rank` counts them."""
    if not len(values):
        return 0
    return int((values > values[0] * size * torch.finfo(torch.float64).eps).sum())
