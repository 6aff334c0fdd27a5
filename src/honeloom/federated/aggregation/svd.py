"""Stack, then keep the best few columns."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.federated.aggregation.parts import check_parts, result_dtype
from honeloom.ops.lowrank import compress, stack_factors
from honeloom.types.updates import Combined, Part

__all__ = ["svd"]


def svd(parts: Sequence[Part], *, rank: int | None = None, energy: float | None = None) -> Combined:
    """Best approximation of the weighted sum of updates by few columns, without a dense matrix.

    The stacked factors are reduced to their small core (of the sum of ranks), whose singular
    values are those of the whole sum; the error is exactly what those that are cut hold.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, of any ranks and scales.
    rank : int, optional
        Columns to keep; without it and without `energy`, as many as the largest client has.
    energy : float, optional
        Keep as few columns as hold this share (0 to 1] of the squared norm; with `rank` too, the
        smaller number counts.

    Returns
    -------
    Combined
        b (m, k) and a (k, n), by falling singular value, which both share evenly.

    References
    ----------
    Eckart and Young 1936, doi:10.1007/BF02288367; for federated LoRA, Bai et al. 2024 (FlexLoRA), arXiv:2402.11505.
    """
    check_parts(parts)
    if rank is None and energy is None:
        rank = max(part.rank for part in parts)
    stacked_b, stacked_a = stack_factors([(part.b, part.a, part.weight * part.scale) for part in parts])
    b, a = compress(stacked_b, stacked_a, rank=rank, energy=energy)
    dtype = result_dtype(parts)
    return Combined(b.to(dtype), a.to(dtype))
