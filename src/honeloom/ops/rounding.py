"""Rounding float64 to a narrower type in one step, to the nearest or at random."""

from __future__ import annotations

import torch

__all__ = ["round_once", "round_stochastically"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, uniforms: torch.Tensor) -> torch.Tensor:
    """Round float64 to one of the two neighbours in a type, so that the expectation is the value itself.

    Parameters
    ----------
    values : Tensor
        float64, any shape.
    dtype : torch.dtype
        A floating type.
    uniforms : Tensor
        float64 in [0, 1), that shape: above the distance to the lower neighbour, as a share of the gap, it is the
        lower one.

    Returns
    -------
    Tensor
        That shape and type; values of the type, infinities and NaN stay as they are.

    References
    ----------
    Croci et al. 2022, doi:10.1098/rsos.211631.
    """
    nearest = round_once(values, dtype)
    back = nearest.double()
    other = _neighbour(nearest, up=back < values)
    far = other.double()
    distance = (values - back) / (far - back)
    # Beyond the largest number lies infinity, where no share of the gap is defined.
    moves = (back != values) & torch.isfinite(distance) & torch.isfinite(far) & (uniforms < distance)
    return torch.where(moves, other, nearest)


def _neighbour(values: torch.Tensor, *, up: torch.Tensor) -> torch.Tensor:
    """Next value above (or below) in the type: floating bits are ordered by magnitude."""
    bits = values.view(_BITS[values.dtype.itemsize])
    away = torch.where(up, bits >= 0, bits < 0)
    smallest = torch.where(up, torch.ones_like(bits), torch.full_like(bits, torch.iinfo(bits.dtype).min + 1))
    step = torch.where(away, bits + 1, bits - 1)
    return torch.where(values == 0, smallest, step).view(values.dtype)
