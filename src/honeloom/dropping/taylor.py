"""First-order estimate of what the loss loses with a unit."""

from __future__ import annotations

import torch

__all__ = ["taylor"]


def taylor(gradient: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """|<dL/du, u - v>| of every row: (B, T, D), (B, T, D) -> (B,), float32.

    Parameters
    ----------
    gradient : Tensor
        Of the summed loss of a row, by the stream u after a unit; 0 at tokens that do not count.
    change : Tensor
        u - v, what the unit has added to the stream v.

    References
    ----------
    Molchanov et al. 2019, arXiv:1906.10771: the first-order criterion, here of a unit's whole contribution.
    """
    return (gradient.float() * change.float()).sum(dim=(1, 2)).abs()
