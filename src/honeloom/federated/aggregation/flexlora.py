"""FlexLoRA's result, without its dense matrix."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.federated.aggregation.svd import svd
from honeloom.types.updates import Combined, Part

__all__ = ["flexlora"]


def flexlora(parts: Sequence[Part], *, rank: int | None = None) -> Combined:
    """Best approximation of the weighted sum of updates at one client's rank.

    The paper forms the sum densely, decomposes it, and sends every client the truncation to its
    own rank. That is the result of `svd`, called once per client rank.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, of any ranks and scales.
    rank : int, optional
        Of the client that downloads; by default the largest one's.

    Returns
    -------
    Combined
        b (m, k) and a (k, n).

    References
    ----------
    Bai et al. 2024 (FlexLoRA), arXiv:2402.11505.
    """
    return svd(parts, rank=rank)
