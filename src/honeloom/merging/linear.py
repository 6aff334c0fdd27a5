"""Weighted average."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honeloom.errors import ConfigError

__all__ = ["linear", "weight_total", "weighted_sum"]


def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool = True) -> torch.Tensor:
    """Weighted average of the same tensor of several models.

    Parameters
    ----------
    tensors : sequence of Tensor
        K tensors of one shape, any floating type.
    weights : sequence of float
        K numbers.
    normalize : bool
        Divide by the sum of the weights.

    Returns
    -------
    Tensor
        That shape, float64; the caller rounds once.

    Raises
    ------
    ConfigError
        The weights sum to 0 and `normalize` is set.

    References
    ----------
    Wortsman et al. 2022 (model soups), arXiv:2203.05482.
    """
    total = weighted_sum(tensors, weights)
    return total.div_(weight_total(weights)) if normalize else total


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
    """Sum of the weights; ConfigError if it is 0, for nothing can be divided by it."""
    total = sum(weights)
    if total == 0:
        raise ConfigError(f"the weights {list(weights)} sum to 0; set method.normalize to false or change them")
    return total
