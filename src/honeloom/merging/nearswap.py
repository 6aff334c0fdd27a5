"""Move towards another model, entry by entry, by no more than a fixed distance."""

from __future__ import annotations

import torch

from honeloom.merging.engine.tensors import Merged, Rule, Tensors
from honeloom.merging.linear import require_models

__all__ = ["nearswap"]


def _plan_nearswap(tensors: Tensors, *, t: float = 0.001) -> Merged:
    """Interpolate from the base a to the model b with the weight min(1, t / |a - b|) of each entry.

    That is a plus b - a, cut to the range from -t to t.

    Parameters
    ----------
    tensors : Tensors
        One model and the base. Weights do not count.
    t : float
        Distance, in units of the weights, up to which b is taken.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        Not one model, or no base.

    References
    ----------
    alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    require_models(tensors, "nearswap", 1, 1)

    def merged(start: int, stop: int) -> torch.Tensor:
        origin = tensors.origin(start, stop)
        return (tensors.models[0](start, stop) - origin).clamp_(-t, t).add_(origin)

    return merged


nearswap = Rule(_plan_nearswap, needs_base=True)
"""Move from the base towards the other model, entry by entry, by no more than t."""
