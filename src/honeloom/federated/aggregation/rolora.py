"""One factor is everybody's, the other is averaged."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.errors import IncompatibleModelsError
from honeloom.federated.aggregation.parts import all_equal, padded_mean, present_parts, result_dtype
from honeloom.types.updates import Combined, Part

__all__ = ["rolora"]


def rolora(parts: Sequence[Part]) -> Combined:
    """Average the factor that was trained this round over clients that share the other one; exact.

    Rounds alternate: one trains B with A fixed, the next A with B fixed. Which one it was is read
    from the factors. Scales are folded into the averaged factor.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, all of one rank r, with equal A or equal B (or both).

    Returns
    -------
    Combined
        b (m, r) and a (r, n).

    Raises
    ------
    IncompatibleModelsError
        Both factors differ between clients, or the ranks do.

    References
    ----------
    Chen et al. 2025 (RoLoRA), arXiv:2502.01755.
    """
    present = present_parts(parts, "rolora")
    rank, dtype = present[0].rank, result_dtype(present)
    shares = [part.weight * part.scale for part in present]
    if all_equal([part.a for part in present]):
        mean = padded_mean([part.b for part in present], shares, 1, rank)
        return Combined(mean.to(dtype), present[0].a.to(dtype))
    if all_equal([part.b for part in present]):
        mean = padded_mean([part.a for part in present], shares, 0, rank)
        return Combined(present[0].b.to(dtype), mean.to(dtype))
    raise IncompatibleModelsError(
        "rolora needs one factor that all clients share, and both A and B differ; flora and svd take any factors"
    )
