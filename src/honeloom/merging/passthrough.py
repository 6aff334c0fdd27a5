"""One model as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honeloom.merging.engine.tensors import Merged, Rule, Tensors, each
from honeloom.merging.linear import require_models

__all__ = ["passthrough"]


def _plan_passthrough(tensors: Tensors, *, scale: float | Sequence[float] = 1.0) -> Merged:
    """Copy one model's tensor, times a number.

    Parameters
    ----------
    tensors : Tensors
        One model. Its weight does not count.
    scale : float
        1 gives the same bits, also of negative zero.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        Not one model.
    """
    require_models(tensors, "passthrough", 1, 1)
    (factor,) = each(scale, 1)

    def merged(start: int, stop: int) -> torch.Tensor:
        return tensors.models[0](start, stop) * factor

    return merged


passthrough = Rule(_plan_passthrough)
"""Copy the tensors of one model."""
