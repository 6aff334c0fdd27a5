"""Relative magnitude: how long a unit's contribution is beside the residual stream."""

from __future__ import annotations

import torch

__all__ = ["magnitude"]


def magnitude(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Length of the contribution over the length of the stream before it: (..., D), (..., D) -> (...).

    In float32. It sees a rescaling of the stream, which the cosine does not. A contribution to a zero stream counts
    as 1, none as 0.

    References
    ----------
    Samragh et al. 2023, arXiv:2312.09299: the ratio as a sign of weakly contributing layers.
    """
    before = before.float()
    change = torch.linalg.vector_norm(after.float() - before, dim=-1)
    length = torch.linalg.vector_norm(before, dim=-1)
    return torch.where(length == 0, (change != 0).float(), change / length)
