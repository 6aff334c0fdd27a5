"""Healing in closed form: channels of a half behind a gap are scaled so that the stream is closest to the source's."""

from __future__ import annotations

import torch

from honeloom.dropping.plan import Room
from honeloom.dropping.scores import Unit

__all__ = ["ChannelFit", "units_behind_gaps"]


class ChannelFit:
    """Least squares of every channel on its own: target = scale x contribution + shift. Sums in float64 alone.

    Parameters
    ----------
    channels : int
        D.
    shifted : bool
        Whether there is a shift; without it the line goes through 0.
    """

    def __init__(self, channels: int, *, shifted: bool) -> None:
        self.shifted = shifted
        self.count = 0
        self._sums = torch.zeros(4, channels, dtype=torch.float64)

    def add(self, contribution: torch.Tensor, target: torch.Tensor) -> None:
        """Add tokens: what the half contributes, and what it would have to, both (N, D)."""
        c, t = contribution.double().cpu(), target.double().cpu()
        self._sums += torch.stack([c.sum(0), t.sum(0), (c * c).sum(0), (c * t).sum(0)])
        self.count += len(c)

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift, each (D,), float64; 1 and 0 for a channel that never contributes."""
        c, t, cc, ct = self._sums
        n = max(1, self.count)
        if self.shifted:
            cc, ct = cc - c * c / n, ct - c * t / n
        flat = cc <= 1e-12 * self._sums[2].clamp_min(torch.finfo(torch.float64).tiny)
        scale = torch.where(flat, torch.ones_like(cc), ct / torch.where(flat, torch.ones_like(cc), cc))
        shift = (t - scale * c) / n if self.shifted else torch.zeros_like(scale)
        return scale, shift


def units_behind_gaps(room: Room, attention: frozenset[int], mlp: frozenset[int]) -> list[Unit]:
    """Halves that healing scales, in the order of the stream.

    Of every run of halves that newly go, the next half that stays; a run at the end has none behind it.

    Parameters
    ----------
    room : Room
        What the source lacks already.
    attention, mlp : frozenset of int
        Layers that end without the half.
    """
    found: list[Unit] = []
    gap = False
    for layer in range(room.layers):
        for unit, gone, absent in (
            (Unit("attention", layer), attention, room.without_attention),
            (Unit("mlp", layer), mlp, room.without_mlp),
        ):
            if layer in gone and layer not in absent:
                gap = True
            elif layer not in gone and gap:
                found.append(unit)
                gap = False
    return found
