"""Angular distance of the residual stream before and after a unit."""

from __future__ import annotations

from math import pi

import torch

from honeloom.dropping.cosine import cosine

__all__ = ["angular"]


def angular(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Angle between the stream before and after a unit in half turns, per token: (..., D), (..., D) -> (...).

    (1/pi) arccos of the cosine, computed as (2/pi) arcsin of half the distance of the unit vectors, which is exact
    for small angles too. 0 means unchanged, 0.5 orthogonal, 1 reversed.

    References
    ----------
    Gromov et al. 2024, arXiv:2403.17887: read at the last token of a row, and the angles averaged over rows.
    """
    return torch.asin((cosine(before, after) / 2).clamp(0.0, 1.0).sqrt()) * (2 / pi)
