"""Where clients go on after an aggregation: a trainable part of their rank, and the rest in the base."""

from __future__ import annotations

import torch

from honeloom.ops.lowrank import compress
from honeloom.types.updates import Combined

__all__ = ["warm", "whole"]


def whole(combined: Combined) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an update with its residual as one pair: b (m, r + q) and a (r + q, n)."""
    if combined.residual is None:
        return combined.b, combined.a
    b, a = combined.residual
    return torch.cat([combined.b, b], dim=1), torch.cat([combined.a, a], dim=0)


def warm(combined: Combined, rank: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Split an aggregated update into a start for training at one rank, and a residual for the base.

    Training that begins anew every round forgets where it was; this start is the best
    approximation of the whole update at the client's rank, and nothing is lost: start and
    residual together are the update.

    Parameters
    ----------
    combined : Combined
        What was aggregated, (m, n).
    rank : int
        The client's, 1 or more.

    Returns
    -------
    b, a : Tensor
        (m, k) and (k, n) with k = min(rank, rank of the update); scale 1.
    residual : (Tensor, Tensor) or None
        (m, q) and (q, n), to be added to the base; None if nothing is left.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: must be 1 or more")
    b, a = (t.to(combined.b.dtype) for t in compress(*whole(combined)))
    rest = (b[:, rank:].contiguous(), a[rank:].contiguous()) if b.shape[1] > rank else None
    return b[:, :rank].contiguous(), a[:rank].contiguous(), rest
