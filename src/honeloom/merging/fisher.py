"""Average weighted by what each model's data say about each entry."""

from __future__ import annotations

import torch

from honeloom.errors import ConfigError
from honeloom.merging.engine.sums import sums
from honeloom.merging.engine.tensors import Merged, Read, Rule, Tensors, WeightedSum, blocks
from honeloom.merging.linear import weight_total

__all__ = ["fisher", "known_data", "positive_average"]


def _plan_fisher(tensors: Tensors, *, eps: float = 1e-6) -> Merged:
    """Average the models with the diagonals of their Fisher information as weights.

    Per entry: sum of w_k F_k x_k over sum of w_k F_k.

    Parameters
    ----------
    tensors : Tensors
        K models; `data` holds the K diagonals, of the same shape, or nothing: then it is the weighted average.
    eps : float
        Added to every Fisher value, in units of the mean of its tensor, so that no entry is without a weight. If all
        diagonals are zero, it is the weighted average.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        A weight is negative, the weights sum to 0, or some models have a diagonal and others have none.

    References
    ----------
    Matena and Raffel 2022, arXiv:2111.09832.
    """
    average = positive_average(tensors, "fisher")
    diagonals = known_data(tensors, "Fisher diagonal")
    means = [sums(_single(read), 1, blocks(tensors.count))[0] / max(1, tensors.count) for read in diagonals]
    if not any(mean * weight for mean, weight in zip(means, tensors.weights, strict=False)):
        return average

    def merged(start: int, stop: int) -> torch.Tensor:
        above = torch.zeros(stop - start, dtype=torch.float64)
        below = torch.zeros_like(above)
        for read, data, weight, mean in zip(tensors.models, diagonals, tensors.weights, means, strict=True):
            share = (data(start, stop) + eps * mean).mul_(weight)
            below += share
            above += share.mul_(read(start, stop))
        return above.div_(below)

    return merged


fisher = Rule(_plan_fisher)
"""Average weighted by the diagonal of each model's Fisher information."""


def positive_average(tensors: Tensors, method: str) -> WeightedSum:
    """Weighted average; ConfigError for a negative weight, of which least squares make no sense, or a sum of 0."""
    if min(tensors.weights) < 0:
        raise ConfigError(f"the weights are {list(tensors.weights)}; {method} needs weights of 0 or more")
    total = weight_total(tensors.weights)
    return WeightedSum(tensors, tuple(weight / total for weight in tensors.weights))


def known_data(tensors: Tensors, what: str) -> tuple[Read, ...]:
    """Data of every model, or of none; ConfigError if some have it and others have not."""
    known = tuple(read for read in tensors.data if read is not None)
    if known and len(known) != len(tensors.models):
        raise ConfigError(
            f"{tensors.name or 'tensor'}: {len(known)} of {len(tensors.models)} models have a {what}; give one for "
            "each, or for none"
        )
    return known


def _single(read: Read) -> Read:
    return lambda start, stop: read(start, stop)[None]
