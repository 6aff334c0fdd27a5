"""Between the base and the average of the models, as far as their angle says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from honeloom.merging.engine.gram import gram
from honeloom.merging.engine.sums import Array, vector_grams
from honeloom.merging.engine.tensors import Merged, Rule, Tensors, WeightedSum
from honeloom.merging.linear import require_models

__all__ = ["model_stock"]


def _plan_model_stock(tensors: Tensors, *, filter_wise: bool = False) -> Merged:
    """Interpolate between the base and the plain average of the models.

    With the mean cosine c of all pairs of task vectors, t = K c / (1 + (K - 1) c), and the result is
    t times the average plus 1 - t times the base. A negative c gives t = 0. A pair with a zero task vector counts as
    c = 0.

    Parameters
    ----------
    tensors : Tensors
        K models, two or more, and their base. Weights do not count.
    filter_wise : bool
        One t per row (along the last dimension) instead of one per tensor.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        Fewer than two models, or no base.

    References
    ----------
    Jang et al. 2024, arXiv:2403.19522.
    """
    require_models(tensors, "model_stock", 2, None)
    if filter_wise:
        return _RowSum(tensors, torch.from_numpy(_shares(vector_grams(tensors, "row", deltas=True))))
    share = float(_shares(gram(tensors, deltas=True).numpy()[None])[0])
    return WeightedSum(tensors, (share,) * len(tensors.models), from_base=True)


model_stock = Rule(_plan_model_stock, needs_base=True)
"""Between the base and the average of the models, as far as the angle of their task vectors says."""


def _shares(grams: Array) -> Array:
    """Factors t / K, (n,), from n groups of dot products, (n, K, K)."""
    models = grams.shape[1]
    lengths = np.sqrt(np.diagonal(grams, axis1=1, axis2=2))
    total = np.zeros(len(grams))
    for i in range(models):
        for j in range(i + 1, models):
            product = lengths[:, i] * lengths[:, j]
            total += np.divide(grams[:, i, j], product, out=np.zeros(len(grams)), where=product != 0)
    cosine = np.maximum(total / (models * (models - 1) / 2), 0.0)
    return np.asarray(cosine / (1.0 + (models - 1) * cosine))


@dataclass(frozen=True, slots=True)
class _RowSum:
    """Base plus a factor of each row times the sum of task vectors."""

    tensors: Tensors
    factors: torch.Tensor

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        total = torch.zeros(stop - start, dtype=torch.float64)
        for delta in self.tensors.deltas(start, stop):
            total += delta
        rows = torch.arange(start, stop) // max(1, self.tensors.columns)
        return total.mul_(self.factors[rows]).add_(self.tensors.origin(start, stop))
