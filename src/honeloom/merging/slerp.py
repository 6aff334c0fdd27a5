"""Spherical interpolation of two models."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from honeloom.merging.engine.gram import gram
from honeloom.merging.engine.sums import Array, vector_grams, vectors_along
from honeloom.merging.engine.tensors import Merged, Rule, Tensors, WeightedSum
from honeloom.merging.linear import require_models, weight_total

__all__ = ["nuslerp", "slerp"]

_SMALLEST_SINE = 1e-6


def _plan_slerp(tensors: Tensors, *, t: float = 0.5) -> Merged:
    """Interpolate along the arc between two tensors taken as vectors.

    With the angle w between the flattened tensors, which keep their own lengths:
    sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b.

    Where no arc is defined, it is straight interpolation (1 - t) a + t b: one vector is zero,
    the directions agree to a sine of 1e-6, or they are opposite, of which a warning tells. Opposite vectors have no
    unique arc; equally long ones then give zero at t = 1/2.

    Parameters
    ----------
    tensors : Tensors
        Two models, a and b. Weights do not count.
    t : float
        0 gives a exactly, 1 gives b exactly.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        Not two models.

    References
    ----------
    Shoemake 1985, doi:10.1145/325334.325242.
    """
    require_models(tensors, "slerp", 2, 2)
    grams = gram(tensors, deltas=False).numpy()[None]
    first, second = _arc_factors(grams, t, tensors.name)
    return WeightedSum(tensors, (float(first[0]), float(second[0])))


def _plan_nuslerp(tensors: Tensors, *, flatten: bool = True, row_wise: bool = False) -> Merged:
    """Interpolate along the arc between two models, or their task vectors, as far as their weights say.

    It is `slerp` at t = w2 / (w1 + w2); with a base, of the task vectors, and added to the base.

    Parameters
    ----------
    tensors : Tensors
        Two models; the base is optional.
    flatten : bool
        One angle per tensor; otherwise one per column (along the first dimension).
    row_wise : bool
        Without `flatten`: one angle per row (along the last dimension) instead.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        Not two models, or their weights sum to 0.

    References
    ----------
    Shoemake 1985, doi:10.1145/325334.325242.
    """
    require_models(tensors, "nuslerp", 2, 2)
    t = tensors.weights[1] / weight_total(tensors.weights)
    deltas = tensors.base is not None
    if flatten:
        first, second = _arc_factors(gram(tensors, deltas=deltas).numpy()[None], t, tensors.name)
        return WeightedSum(tensors, (float(first[0]), float(second[0])), from_base=deltas)
    grams = vector_grams(tensors, "row" if row_wise else "column", deltas=deltas)
    first, second = _arc_factors(grams, t, tensors.name)
    return _VectorSum(tensors, torch.from_numpy(first), torch.from_numpy(second), row_wise)


slerp = Rule(_plan_slerp)
"""Spherical interpolation of two models."""
nuslerp = Rule(_plan_nuslerp)
"""Spherical interpolation of two models by their weights, whole or row by row."""


@dataclass(frozen=True, slots=True)
class _VectorSum:
    """Sum of factor times model, with factors of each row or column; from the base if there is one."""

    tensors: Tensors
    first: torch.Tensor
    second: torch.Tensor
    row_wise: bool

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        index = torch.arange(start, stop)
        columns = vectors_along(self.tensors, "row" if self.row_wise else "column")[1]
        vector = index // columns if self.row_wise else index % columns
        base = self.tensors.base
        values = self.tensors.values(start, stop) if base is None else self.tensors.deltas(start, stop)
        total = values[0] * self.first[vector] + values[1] * self.second[vector]
        return total if base is None else total.add_(base(start, stop))


def _arc_factors(grams: Array, t: float, name: str) -> tuple[Array, Array]:
    """Factors of a and b from the dot products of both, (n, 2, 2), for n pairs."""
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = grams[:, 0, 1] / (np.sqrt(grams[:, 0, 0]) * np.sqrt(grams[:, 1, 1]))
    angle = np.arccos(np.clip(np.nan_to_num(cosine, nan=1.0), -1.0, 1.0))
    sine = np.sin(angle)
    straight = sine < _SMALLEST_SINE
    opposite = int((straight & (cosine < 0)).sum())
    if opposite:
        warnings.warn(
            f"{name or 'tensor'}: {opposite} of {len(grams)} pairs of vectors are opposite; no arc is defined between "
            "them, and they are interpolated straight",
            stacklevel=2,
        )
    sine[straight] = 1.0
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    return first, np.where(straight, t, np.sin(t * angle) / sine)
