"""Cosine importance: how little a sub-layer turns the residual stream."""

from __future__ import annotations

import torch

__all__ = ["cosine"]


def cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the stream before and after a sub-layer, per token: (..., D), (..., D) -> (...).

    Computed as half the squared distance of the two unit vectors, in float32: near a cosine
    of 1 that keeps the digits which 1 - cos would cancel. 0 means the direction is unchanged,
    2 that it is reversed; a zero vector counts as unchanged against a zero vector.

    References
    ----------
    He et al. 2024, arXiv:2406.15786 (LLM-Drop): importance is the mean over tokens.
    """
    a = torch.nn.functional.normalize(before.float(), dim=-1)
    b = torch.nn.functional.normalize(after.float(), dim=-1)
    return 0.5 * (a - b).square().sum(dim=-1)
