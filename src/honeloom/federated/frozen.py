"""Additions to the base that nobody trains: what the server keeps of them, and what a client is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["FrozenAdditions", "Pair", "Pairs", "folded", "stacked"]

Pair = tuple[torch.Tensor, torch.Tensor]
Pairs = Mapping[str, Pair]
"""Module -> b (m, r) and a (r, n); the addition is b @ a."""


def stacked(one: Pairs, other: Pairs) -> dict[str, Pair]:
    """Both additions as one, module by module."""
    found = dict(one)
    for module, (b, a) in other.items():
        if module in found:
            b, a = torch.cat([found[module][0], b], dim=1), torch.cat([found[module][1], a], dim=0)
        found[module] = (b, a)
    return found


def folded(pairs: Pairs) -> dict[str, Pair]:
    """The same additions with no more columns than their matrices can need: longer ones become (b @ a, identity).

    A product is cheaper than a decomposition, and exact up to rounding.
    """
    found = {}
    for module, (b, a) in pairs.items():
        m, n = b.shape[0], a.shape[1]
        if b.shape[1] > min(m, n):
            product = b @ a
            b, a = (product, torch.eye(n, dtype=a.dtype)) if n <= m else (torch.eye(m, dtype=b.dtype), product)
        found[module] = (b, a)
    return found


@dataclass(slots=True)
class FrozenAdditions:
    """Additions by version, from 1; 0 is none.

    What is added in every round would grow without end: once a module's columns are more than its
    matrix can need, all additions so far are folded. A client that has the version before does the
    same, from the same numbers; whoever is further behind is sent the whole.

    Attributes
    ----------
    entries : list of dict
        Additions since the last folding, which is the first of them; scale 1.
    first : int
        Version of the first entry.
    latest : dict
        What the version that was folded added.
    """

    entries: list[dict[str, Pair]] = field(default_factory=list)
    first: int = 1
    latest: dict[str, Pair] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Of the last addition."""
        return self.first + len(self.entries) - 1

    def add(self, addition: Pairs) -> None:
        """Take one more addition as the next version."""
        addition = folded(addition)  # a stack of many clients may itself have more columns than are needed
        self.entries.append(addition)
        whole = self.total()
        if any(b.shape[1] > min(b.shape[0], a.shape[1]) for b, a in whole.values()):
            self.first, self.entries, self.latest = self.version, [folded(whole)], addition

    def total(self) -> dict[str, Pair]:
        """All additions."""
        return _summed(self.entries)

    def until(self, held: int) -> tuple[int, dict[str, Pair]]:
        """What to give back to whoever held a version and lost it, and the version that this is.

        A version that was folded since is not to be had any more: its successor stands for it,
        which what is sent next leads to; (0, nothing) for older ones.
        """
        if held == self.first - 1 and held > 0:
            held = self.first
        if not self.first <= held <= self.version:
            return 0, {}
        return held, _summed(self.entries[: held - self.first + 1])

    def after(self, held: int) -> tuple[int, dict[str, Pair]]:
        """What whoever holds a version lacks, and the version to which it is added: 0 where it is the whole."""
        if held > self.version or held < self.first - 1:
            held = 0
        if held == self.first - 1 and held > 0:
            return (held, self.latest) if len(self.entries) == 1 else (0, self.total())
        return held, _summed(self.entries[max(0, held - self.first + 1) :])


def _summed(entries: Sequence[Pairs]) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    for entry in entries:
        found = stacked(found, entry)
    return found
