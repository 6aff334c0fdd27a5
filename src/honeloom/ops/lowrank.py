"""Products of two thin factors, handled without ever forming the dense matrix.

A LoRA update is scale * B @ A with B (m, r) and A (r, n). Everything here works on the factors in
float64 and costs O((m + n) r^2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from honeloom.ops.noise import normal

__all__ = [
    "LinearMap", "compress", "product_norm", "randomised_svd", "relative_error", "stack_factors", "thin_svd",
    "truncate",
]  # fmt: skip

Factor = tuple[torch.Tensor, torch.Tensor, float]


def stack_factors(factors: Sequence[Factor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a sum of low-rank products as one product, exactly.

    Parameters
    ----------
    factors : sequence of (B, A, scale)
        B (m, r_i), A (r_i, n); ranks may differ.

    Returns
    -------
    B : Tensor
        (m, sum of r_i), float64, each part times its scale.
    A : Tensor
        (sum of r_i, n), float64.

    References
    ----------
    Wang et al. 2024 (FLoRA), arXiv:2409.05976.
    """
    if not factors:
        raise ValueError("stack_factors needs at least one (B, A, scale)")
    stacked_b = torch.cat([b.double() * scale for b, _, scale in factors], dim=1)
    return stacked_b, torch.cat([a.double() for _, a, _ in factors], dim=0)


def thin_svd(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition of B @ A by QR of both factors and an SVD of their small core.

    Parameters
    ----------
    b, a : Tensor
        (m, r) and (r, n).

    Returns
    -------
    U, S, Vt : Tensor
        (m, k), (k,) descending, (k, n) with k = min(m, r, n); float64.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def truncate(
    b: torch.Tensor, a: torch.Tensor, *, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Best approximation of B @ A by fewer columns (Eckart and Young).

    Parameters
    ----------
    b, a : Tensor
        (m, r) and (r, n).
    rank : int, optional
        Columns to keep, 1 or more.
    energy : float, optional
        Keep as few columns as hold this share (0 to 1] of the squared Frobenius norm. With
        `rank` too, the smaller number of columns counts.

    Returns
    -------
    B, A : Tensor
        (m, k) and (k, n), float64; the singular values are shared evenly between both.
    relative_error : float
        Frobenius norm of what was cut over that of B @ A; 0 for a zero product.
    """
    if rank is None and energy is None:
        raise ValueError("truncate needs rank or energy")
    _check_amount(rank, energy)
    u, s, vt = thin_svd(b, a)
    squares = s.square()
    total = float(squares.sum())
    keep = _columns_to_keep(squares, rank, energy)
    root = s[:keep].sqrt()
    error = (float(squares[keep:].sum()) / total) ** 0.5 if total > 0 else 0.0
    return u[:, :keep] * root, root.unsqueeze(1) * vt[:keep], error


def _check_amount(rank: int | None, energy: float | None) -> None:
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ValueError(f"rank {rank} must be 1 or more and energy {energy} in (0, 1]")


def _columns_to_keep(squares: torch.Tensor, rank: int | None, energy: float | None) -> int:
    total = float(squares.sum())
    keep = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None and total > 0:
        keep = min(keep, int((squares.cumsum(0) < energy * total).sum()) + 1)
    return keep


def compress(
    b: torch.Tensor, a: torch.Tensor, *, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of B @ A by fewer columns, as `truncate`, several times faster for tall factors.

    The triangular factors come from r x r Gram matrices instead of Householder reflections, and
    nothing but the columns kept is computed at full height. Gram matrices resolve singular values
    only above about 1e-8 of the largest, so which of smaller ones are kept is not told; with
    every column kept the product is B @ A to float64 rounding all the same, for the half that is
    divided out is the half that was multiplied in.

    Parameters
    ----------
    b, a : Tensor
        (m, r) and (r, n).
    rank : int, optional
        Columns to keep at most.
    energy : float, optional
        Keep as few columns as hold this share (0 to 1] of the squared Frobenius norm.

    Returns
    -------
    B, A : Tensor
        (m, k) and (k, n), float64, k at most min(m, r, n), by falling singular value, which both share evenly.
    """
    _check_amount(rank, energy)
    b, a = b.double(), a.double()
    gram_b, gram_a = b.T @ b, a @ a.T
    # Columns of B to length one: a pair with small b and large a counts by its product.
    length = gram_b.diagonal().sqrt()
    length = torch.where(length > 0, length, 1.0)
    half_b, back_b = _halves(gram_b / length / length.unsqueeze(1))
    half_a, back_a = _halves(gram_a * length * length.unsqueeze(1))
    u, s, vt = torch.linalg.svd(half_b @ half_a.T)
    most = min(b.shape[0], a.shape[1], len(s))
    keep = min(most, _columns_to_keep(s.square(), rank, energy))
    root = s[:keep].sqrt()
    left = back_b @ (u[:, :keep] * root) / length.unsqueeze(1)
    right = (vt[:keep].T * root).T @ back_a.T * length
    return b @ left, right @ a


def _halves(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H with H.T @ H = gram, and its inverse; tiny eigenvalues are lifted, which cancels in the product."""
    values, vectors = torch.linalg.eigh(gram)
    largest = float(values[-1]) if len(values) else 0.0
    root = values.clamp_min(1e-15 * largest if largest > 0 else 1.0).sqrt()
    return root.unsqueeze(1) * vectors.T, vectors / root


def relative_error(b: torch.Tensor, a: torch.Tensor, reference_b: torch.Tensor, reference_a: torch.Tensor) -> float:
    """Frobenius norm of B @ A - B' @ A' over that of the reference B' @ A'.

    Exact up to float64 rounding: the difference is one stacked product, whose norm is that of
    the small product of the triangular factors. (Gram matrices would lose half the digits.)

    Returns
    -------
    float
        0 if both products are zero, infinity if only the reference is.
    """
    difference = product_norm(*stack_factors([(b, a, 1.0), (reference_b, reference_a, -1.0)]))
    reference = product_norm(reference_b, reference_a)
    if reference == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / reference


def product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Frobenius norm of B @ A, by the triangular factors of both."""
    r_b = torch.linalg.qr(b.double(), mode="r").R
    r_a = torch.linalg.qr(a.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A matrix known only by its products: `matmul` takes (n, k) to (m, k), `transposed` (m, k) to (n, k)."""

    shape: tuple[int, int]
    matmul: Callable[[torch.Tensor], torch.Tensor]
    transposed: Callable[[torch.Tensor], torch.Tensor]


def randomised_svd(
    matrix: torch.Tensor | LinearMap, rank: int, *, oversample: int = 8, iterations: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets by a random range finder with power iterations.

    Parameters
    ----------
    matrix : Tensor or LinearMap
        (m, n).
    rank : int
        Triplets wanted, 1 or more.
    oversample : int
        Extra directions; more costs time and gains accuracy.
    iterations : int
        Power iterations, each re-orthogonalised; more separate close singular values.
    seed : int
        Of the directions; equal seeds give equal directions on every device.

    Returns
    -------
    U, S, Vt : Tensor
        (m, k), (k,) descending, (k, n) with k = min(rank, m, n); float64.

    References
    ----------
    Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    operator = _as_map(matrix)
    m, n = operator.shape
    if rank < 1:
        raise ValueError(f"rank {rank}: must be 1 or more")
    width = min(rank + oversample, m, n)
    device = matrix.device if isinstance(matrix, torch.Tensor) else "cpu"
    directions = normal(seed, "randomised_svd", n * width, dtype=torch.float64, device=device).view(n, width)
    basis = torch.linalg.qr(operator.matmul(directions)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(operator.transposed(basis)).Q
        basis = torch.linalg.qr(operator.matmul(basis)).Q
    u, s, vt = torch.linalg.svd(operator.transposed(basis).T, full_matrices=False)
    keep = min(rank, m, n)
    return (basis @ u)[:, :keep], s[:keep], vt[:keep]


def _as_map(matrix: torch.Tensor | LinearMap) -> LinearMap:
    if isinstance(matrix, LinearMap):
        return matrix
    wide = matrix.double()
    return LinearMap((wide.shape[0], wide.shape[1]), lambda x: wide @ x, lambda x: wide.T @ x)
