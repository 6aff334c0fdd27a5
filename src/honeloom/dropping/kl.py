"""Divergence of the predictions without a unit: leave one out, without labels."""

from __future__ import annotations

import torch

__all__ = ["kl"]


def kl(logits: torch.Tensor, logits_without: torch.Tensor) -> torch.Tensor:
    """KL(whole model || model without a unit) of the next token, in nats: (..., V), (..., V) -> (...).

    In float32; rounding below 0 is cut off.
    """
    whole = torch.log_softmax(logits.float(), dim=-1)
    without = torch.log_softmax(logits_without.float(), dim=-1)
    return (whole.exp() * (whole - without)).sum(dim=-1).clamp_min(0.0)
