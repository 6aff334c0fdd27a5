"""A quadratic model of what was measured so far, and where it is lowest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

__all__ = ["lowest_of_quadratic"]

Values = npt.NDArray[np.float64]
_SPARE = 1.5
"""Points per coefficient of the model."""
_RIDGE = 1e-10


def lowest_of_quadratic(points: Values, levels: Values, weights: Values) -> Values | None:
    """Minimum within [0, 1]^n of a quadratic fitted to points.

    Parameters
    ----------
    points : ndarray
        (m, n), in the order of their measurement. The later half is used, or as many as it takes, so that the model is
        local.
    levels : ndarray
        (m,), what was measured there.
    weights : ndarray
        (m,), how much each counts: in proportion to its inverse variance.

    Returns
    -------
    ndarray or None
        (n,). With cross terms if there are enough points, else without; None if there are too few for that too, or
        the model has no minimum.

    References
    ----------
    Hansen 2019, A global surrogate assisted CMA-ES, doi:10.1145/3321707.3321842, for the use of such models.
    """
    n = points.shape[1]
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    if len(points) < _SPARE * (1 + n + len(pairs)):
        pairs = [(i, i) for i in range(n)]
    needed = int(np.ceil(_SPARE * (1 + n + len(pairs))))
    if len(points) < needed:
        return None
    first = len(points) - max(needed, len(points) // 2)
    centre = points[first:].mean(axis=0)
    spread = np.maximum(points[first:].std(axis=0), 1e-12)
    hessian, slope = _fit((points[first:] - centre) / spread, levels[first:], weights[first:], pairs)
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return None
    low, high = (0.0 - centre) / spread, (1.0 - centre) / spread
    root = np.linalg.cholesky(hessian).T
    found = lsq_linear(root, -np.linalg.solve(root.T, slope), bounds=(low, high), tol=1e-14)
    lowest: Values = np.clip(centre + spread * found.x, 0.0, 1.0)
    return lowest


def _fit(z: Values, levels: Values, weights: Values, pairs: list[tuple[int, int]]) -> tuple[Values, Values]:
    """Hessian and gradient at 0 of the weighted least-squares quadratic."""
    n = z.shape[1]
    columns = [np.ones(len(z)), *z.T, *(z[:, i] * z[:, j] * (0.5 if i == j else 1.0) for i, j in pairs)]
    design = np.stack(columns, axis=1) * np.sqrt(weights)[:, None]
    target = (levels - levels.mean()) * np.sqrt(weights)
    normal = design.T @ design
    normal[np.diag_indices_from(normal)] += _RIDGE * np.trace(normal) / len(normal)
    solved = np.linalg.solve(normal, design.T @ target)
    hessian = np.zeros((n, n))
    for (i, j), value in zip(pairs, solved[1 + n :], strict=True):
        hessian[i, j] = hessian[j, i] = value
    return hessian, solved[1 : 1 + n]
