"""One A for everybody, averages of B."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.errors import IncompatibleModelsError
from honeloom.federated.aggregation.parts import all_equal, check_parts, padded_mean, result_dtype
from honeloom.types.updates import Combined, Part

__all__ = ["ffa"]


def ffa(parts: Sequence[Part]) -> Combined:
    """Average scale * B over clients whose A was frozen at one shared start; exact.

    A client of smaller rank must hold the first rows of the others' A; its B is filled up with
    zeros, which is exact too.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, their A nested prefixes of one another.

    Returns
    -------
    Combined
        b (m, r) and a (r, n) with r the largest rank.

    Raises
    ------
    IncompatibleModelsError
        The A differ, so that averaging B would mean nothing.

    References
    ----------
    Sun et al. 2024 (FFA-LoRA), arXiv:2403.12313.
    """
    check_parts(parts)
    largest = max(parts, key=lambda part: part.rank)
    if not all(all_equal([largest.a[: part.rank], part.a]) for part in parts):
        raise IncompatibleModelsError(
            "ffa needs one frozen A for all clients (of smaller ranks its first rows), and theirs differ; "
            "flora and svd take any factors"
        )
    dtype = result_dtype(parts)
    b = padded_mean([part.b for part in parts], [part.weight * part.scale for part in parts], 1, largest.rank)
    return Combined(b.to(dtype), largest.a.to(dtype))
