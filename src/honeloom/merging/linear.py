"""Weighted average."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from honeloom.errors import ConfigError
from honeloom.merging.engine.tensors import Merged, Rule, Tensors, WeightedSum

__all__ = ["linear", "require_models", "weight_total", "weighted_sum"]


def _plan_linear(tensors: Tensors, *, normalize: bool = True) -> Merged:
    """Weighted average of the models.

    Parameters
    ----------
    tensors : Tensors
        K models.
    normalize : bool
        Divide by the sum of the weights.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        The weights sum to 0 and `normalize` is set.

    References
    ----------
    Wortsman et al. 2022 (model soups), arXiv:2203.05482.
    """
    total = weight_total(tensors.weights) if normalize else 1.0
    return WeightedSum(tensors, tuple(weight / total for weight in tensors.weights))


linear = Rule(_plan_linear)
"""Weighted average of the models."""


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum of weight times tensor in the order given, in float64.

    Products and sums are rounded one by one: a fused step would round differently at the end
    of a vector, and so make the result depend on how a tensor is cut.
    """
    if not tensors or len(tensors) != len(weights):
        raise ValueError(f"{len(tensors)} tensors and {len(weights)} weights; one weight per tensor is needed")
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor.double() * weight
    return total


def weight_total(weights: Sequence[float]) -> float:
    """Sum of the weights; ConfigError if it is 0 but for rounding, for nothing can be divided by it."""
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
        raise ConfigError(f"the weights {list(weights)} sum to 0; set normalize to false or change them")
    return total


def require_models(tensors: Tensors, method: str, least: int, most: int | None) -> None:
    """Refuse a number of models that a method cannot merge (ConfigError); the base does not count."""
    count = len(tensors.models)
    if count < least or (most is not None and count > most):
        wanted = f"exactly {least}" if least == most else f"at least {least}"
        raise ConfigError(f"{method} takes {wanted} model{'s' * (least > 1)}, found {count}; list others, or none")
