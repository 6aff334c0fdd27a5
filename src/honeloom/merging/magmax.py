"""Of every entry, the largest change."""

from __future__ import annotations

import torch

from honeloom.merging.engine.tensors import Merged, Rule, Tensors

__all__ = ["magmax"]


def _plan_magmax(tensors: Tensors, *, scale: float = 1.0) -> Merged:
    """Add to the base, entry by entry, the task vector that is largest in absolute value.

    Parameters
    ----------
    tensors : Tensors
        K models and their base. The weights multiply the task vectors first; the paper has none.
    scale : float
        Multiplier on the merged task vector.

    Returns
    -------
    callable
        Elements start..stop of the result, float64. Of entries of one size the first model's counts.

    Raises
    ------
    ConfigError
        No base.

    References
    ----------
    Marczak et al. 2024, arXiv:2407.06322.
    """

    def merged(start: int, stop: int) -> torch.Tensor:
        origin = tensors.origin(start, stop)
        largest = torch.zeros_like(origin)
        for read, weight in zip(tensors.models, tensors.weights, strict=True):
            delta = (read(start, stop) - origin).mul_(weight)
            largest = torch.where(delta.abs() > largest.abs(), delta, largest)
        return largest.mul_(scale).add_(origin)

    return merged


magmax = Rule(_plan_magmax, needs_base=True)
"""Of every entry, the largest change that any model made."""
