"""How a federation goes on after each rule: what clients begin with, what they train, what becomes frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Continuation", "continuation_of", "follows"]

Trains = Literal["both", "a", "b"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """A rule's round.

    Attributes
    ----------
    start : {"fresh", "shared", "carry"}
        As of `TrainTask`. fresh: the aggregate goes into the frozen additions. shared and carry: it
        is what clients begin with.
    alike : bool
        Whether the first adapters are the same for everybody: averages of factors need that, and
        it keeps the rank of sums low.
    alternates : bool
        B in odd rounds and A in even ones.
    only_b : bool
        A is never trained.
    """

    start: Literal["fresh", "shared", "carry"]
    alike: bool = True
    alternates: bool = False
    only_b: bool = False

    def trains(self, number: int) -> Trains:
        """Which factors a round, counted from 1, trains."""
        if self.only_b or (self.alternates and number % 2 == 1):
            return "b"
        return "a" if self.alternates else "both"


_RULES = {
    "flora": Continuation("fresh", alike=False),
    "svd": Continuation("carry"),
    "flexlora": Continuation("shared"),
    "fedit": Continuation("shared"),
    "zero_pad": Continuation("shared"),
    "fedex": Continuation("shared"),
    "ffa": Continuation("shared", only_b=True),
    "rolora": Continuation("shared", alternates=True),
}


def continuation_of(rule: str, *, reset: bool = False) -> Continuation:
    """That of a rule; a rule of a plug-in begins anew every round, which is right for any, as `reset` does."""
    if reset:
        return Continuation("fresh", alike=False)
    return _RULES.get(rule, Continuation("fresh", alike=False))


def follows(rule: str, uplink: str, server: str) -> bool:
    """Whether clients move shared factors on by themselves, from everybody's scalars: averages of one shape can."""
    return uplink == "scalars" and rule in ("fedit", "ffa", "rolora") and server == "none"
