"""Stacking: the sum of products is the product of stacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honeloom.federated.aggregation.parts import check_parts, result_dtype
from honeloom.types.updates import Combined, Part

__all__ = ["flora"]


def flora(parts: Sequence[Part]) -> Combined:
    """Stack B side by side and A one below the other; weight and scale go onto A alone.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, of any ranks r_k and scales.

    Returns
    -------
    Combined
        b (m, R) and a (R, n) with R the sum of the r_k; b @ a = sum of p_k s_k B_k A_k. float32,
        or float64 if an input is.

    References
    ----------
    Wang et al. 2024 (FLoRA), arXiv:2409.05976.
    """
    check_parts(parts)
    dtype, rank = result_dtype(parts), sum(part.rank for part in parts)
    b = torch.empty(parts[0].b.shape[0], rank, dtype=dtype, device=parts[0].b.device)
    a = torch.empty(rank, parts[0].a.shape[1], dtype=dtype, device=parts[0].a.device)
    start = 0
    for part in parts:
        stop = start + part.rank
        b[:, start:stop] = part.b
        if part.a.dtype is dtype:
            torch.mul(part.a, part.weight * part.scale, out=a[start:stop])
        else:  # a product in the narrow type would round there
            a[start:stop] = part.a.to(dtype).mul_(part.weight * part.scale)
        start = stop
    return Combined(b, a)
