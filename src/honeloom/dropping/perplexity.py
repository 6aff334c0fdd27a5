"""Rise of the loss without a unit: leave one out."""

from __future__ import annotations

import torch

__all__ = ["perplexity"]


def perplexity(losses: torch.Tensor, losses_without: torch.Tensor) -> torch.Tensor:
    """By how much each loss rises without a unit, in nats: (...), (...) -> (...), float64.

    Over the scored tokens, its mean is the logarithm of the ratio of the perplexities. Negative where the
    model is better without.

    References
    ----------
    Kim et al. 2024, arXiv:2402.02834 (Shortened LLaMA): the criterion "PPL".
    """
    return losses_without.double() - losses.double()
