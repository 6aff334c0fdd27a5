"""What a client's update counts: its share of the sum, and whether it is let in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from honeloom.types.updates import Part

__all__ = ["capped", "kept_part", "outliers"]

Pair = tuple[torch.Tensor, torch.Tensor]
FEWEST_TO_JUDGE = 3
"""Updates from which on one of them can be called an outlier; fewer are compared with those of earlier rounds."""


def outliers(norms: Sequence[float], times: float, earlier: float = 0.0) -> dict[int, str]:
    """Places of norms that are over `times` the median of the others, and why.

    Fewer than three are compared with the largest of earlier rounds. Where that, or most of the
    others, is 0, nothing can be said.
    """
    found = {}
    for place, norm in enumerate(norms):
        others = [other for k, other in enumerate(norms) if k != place]
        usual = statistics.median(others) if len(norms) >= FEWEST_TO_JUDGE else earlier
        if norm > times * usual > 0:
            found[place] = f"norm {norm:.3g} of its update is over {times:g} times {usual:.3g}"
    return found


def capped(rows: Sequence[int], most: float) -> list[float]:
    """Shares by rows, none over `most` (or all equal, if that is too little); the others get what is cut off."""
    shares = [n / sum(rows) for n in rows]
    if most * len(rows) <= 1:
        return [1 / len(rows)] * len(rows)
    fixed: set[int] = set()
    while over := {k for k, share in enumerate(shares) if share > most + 1e-12} - fixed:
        fixed |= over
        left = sum(n for k, n in enumerate(rows) if k not in fixed)
        shares = [most if k in fixed else n / left * (1 - most * len(fixed)) for k, n in enumerate(rows)]
    return shares


def kept_part(trained: Pair, rest: Pair | None, scale: float, share: float) -> Part:
    """A client's update beside what is frozen for everybody: what it trained, and what it kept of the aggregate."""
    b, a = trained[0].float(), trained[1].float()
    if rest is None or not rest[0].shape[1]:
        return Part(b, a, scale, share)
    return Part(torch.cat([b * scale, rest[0]], dim=1), torch.cat([a, rest[1]], dim=0), 1.0, share)
