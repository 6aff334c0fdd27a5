"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honeloom.merging.linear import weight_total, weighted_sum

__all__ = ["task_arithmetic"]


def task_arithmetic(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> torch.Tensor:
    """Base plus scale times the weighted sum of task vectors (model minus base).

    Parameters
    ----------
    base : Tensor
        The common ancestor's tensor, any floating type.
    tensors : sequence of Tensor
        K tensors of that shape.
    weights : sequence of float
        K numbers.
    scale : float
        The paper's lambda; 0 gives the base exactly.
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
    Ilharco et al. 2023, arXiv:2212.04089.
    """
    origin = base.double()
    change = weighted_sum([tensor.double() - origin for tensor in tensors], weights)
    if normalize:
        change /= weight_total(weights)
    return change.mul_(scale).add_(origin)
