"""Block influence: the cosine importance of whole blocks."""

from __future__ import annotations

import torch

from honeloom.dropping.cosine import cosine

__all__ = ["block_influence"]


def block_influence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the stream before and after a block, per token: (..., D), (..., D) -> (...).

    References
    ----------
    Men et al. 2024, arXiv:2403.03853 (ShortGPT): BI is the mean over tokens.
    """
    return cosine(before, after)
