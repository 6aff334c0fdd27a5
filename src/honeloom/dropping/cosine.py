"""Cosine importance: how little a unit turns the residual stream."""

from __future__ import annotations

import torch

__all__ = ["cosine"]


def cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the stream before and after a unit, per token: (..., D), (..., D) -> (...).

    Computed as half the squared distance of the two unit vectors, in float32: near a cosine
    of 1 that keeps the digits which 1 - cos would cancel. 0 means the direction is unchanged,
    2 that it is reversed. A zero vector counts as unchanged against a zero vector, and as orthogonal
    to any other.

    References
    ----------
    He et al. 2024, arXiv:2406.15786 (LLM-Drop): importance is the mean over tokens.
    """
    before, after = before.float(), after.float()
    length_before = torch.linalg.vector_norm(before, dim=-1, keepdim=True)
    length_after = torch.linalg.vector_norm(after, dim=-1, keepdim=True)
    apart: torch.Tensor = before / length_before.clamp_min(_TINY) - after / length_after.clamp_min(_TINY)
    value: torch.Tensor = 0.5 * apart.square_().sum(dim=-1)
    one_is_zero = ((length_before == 0) != (length_after == 0)).squeeze(-1)
    return value.masked_fill_(one_is_zero, 1.0)


_TINY = torch.finfo(torch.float32).tiny
