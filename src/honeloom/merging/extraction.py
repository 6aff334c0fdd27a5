"""The low-rank part of a difference of weights."""

from __future__ import annotations

import torch

from honeloom.ops.lowrank import randomised_svd

__all__ = ["extract_factors"]

_FIRST_WIDTH = 16


def extract_factors(
    delta: torch.Tensor, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate a matrix by a product of two thin ones, by a randomised singular value decomposition.

    At full rank the product is the matrix, to float64 rounding. Below, its error is that of the best product of that
    rank (the root of the squared singular values left out; Eckart and Young 1936, doi:10.1007/BF02288367) times a
    factor close to 1, which random directions cost.

    Parameters
    ----------
    delta : Tensor
        (m, n), float64, not zero.
    rank : int, optional
        Columns at most, 1 or more; by default min(m, n).
    energy : float, optional
        Keep as few columns as hold this share (0 to 1] of the squared Frobenius norm, within `rank`.
    seed : int
        Of the random directions.

    Returns
    -------
    B, A : Tensor
        (m, k) and (k, n), float64, by falling singular value, which both share evenly.

    Raises
    ------
    ValueError
        `rank` or `energy` is out of range.

    References
    ----------
    Halko, Martinsson, Tropp 2011, arXiv:0909.4061.
    """
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy}: must be above 0 and at most 1")
    most = min(*delta.shape, rank if rank is not None else max(delta.shape))
    width, keep = (most if energy is None else min(_FIRST_WIDTH, most)), most
    u, s, vt = randomised_svd(delta, width, seed=seed)
    if energy is not None:
        wanted = energy * float(torch.linalg.matrix_norm(delta)) ** 2
        while float(s.square().sum()) < wanted and width < most:
            width = min(2 * width, most)
            u, s, vt = randomised_svd(delta, width, seed=seed)
        keep = min(width, int((s.square().cumsum(0) < wanted).sum()) + 1)
    root = s[:keep].sqrt()
    return u[:, :keep] * root, root.unsqueeze(1) * vt[:keep]
