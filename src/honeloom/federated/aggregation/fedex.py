"""Averages of the factors, and the rest of the sum beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honeloom.federated.aggregation.fedit import fedit
from honeloom.federated.aggregation.parts import present_parts, result_dtype
from honeloom.types.updates import Combined, Part

__all__ = ["fedex"]


def fedex(parts: Sequence[Part]) -> Combined:
    """Average B and A apart, and return what that misses of the sum as a residual for the base; exact.

    With b the sum of p_k s_k B_k, the residual is the sum of p_k s_k B_k (A_k - a): K r columns,
    as stacked factors, never dense.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, all of one rank r.

    Returns
    -------
    Combined
        b (m, r), a (r, n), and residual (m, K r), (K r, n).

    Raises
    ------
    IncompatibleModelsError
        The ranks differ.

    References
    ----------
    Singhal et al. 2024 (FedEx-LoRA), arXiv:2410.09432.
    """
    present = present_parts(parts, "fedex")
    mean = fedit(present)
    dtype = result_dtype(present)
    # Against the mean of A as it is rounded, so that the residual makes good for that.
    pairs = [(part.b.double() * (part.weight * part.scale), part.a.double()) for part in present]
    lost = torch.cat([b for b, _ in pairs], dim=1), torch.cat([a - mean.a.double() for _, a in pairs], dim=0)
    return Combined(mean.b, mean.a, (lost[0].to(dtype), lost[1].to(dtype)))
