"""Rounding float64 to a narrower type in one step."""

from __future__ import annotations

import torch

__all__ = ["round_once"]


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to the nearest value of a type, ties to even.

    Torch itself converts float64 to the 16-bit types through float32 and so rounds twice, which
    can end up beyond half a unit in the last place. Here the first step rounds to odd: it cuts,
    and sets the last bit if anything was lost, after which the second step is right.

    Parameters
    ----------
    values : Tensor
        float64, any shape.
    dtype : torch.dtype
        A floating type.

    Returns
    -------
    Tensor
        That shape and type.

    References
    ----------
    Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819.
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    nearest = values.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    bits = bits - (back.abs() > values.abs()).int()  # toward zero; int32 holds sign and magnitude
    return (bits | (back != values).int()).view(torch.float32).to(dtype)
