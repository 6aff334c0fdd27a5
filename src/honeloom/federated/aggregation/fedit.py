"""Averages of the factors."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.federated.aggregation.parts import padded_mean, present_parts, result_dtype
from honeloom.types.updates import Combined, Part

__all__ = ["fedit"]


def fedit(parts: Sequence[Part]) -> Combined:
    """Average B and A apart, as FedAvg of the adapter's parameters does; scales are folded into B.

    The product of averages is not the average of products: own terms count p_k squared, and
    cross terms B_k A_j enter that belong to no client. It is exact if all B or all A are equal,
    or for one client. Clients without factors for the module count as B = 0.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, all of one rank r.

    Returns
    -------
    Combined
        b (m, r) and a (r, n).

    Raises
    ------
    IncompatibleModelsError
        The ranks differ.

    References
    ----------
    Zhang et al. 2023 (FedIT), arXiv:2305.05644.
    """
    present = present_parts(parts, "fedit")
    rank, dtype, held = present[0].rank, result_dtype(present), sum(part.weight for part in present)
    b = padded_mean([part.b for part in present], [part.weight * part.scale for part in present], 1, rank)
    shares = [part.weight / held if held else 1 / len(present) for part in present]
    a = padded_mean([part.a for part in present], shares, 0, rank)
    return Combined(b.to(dtype), a.to(dtype))
