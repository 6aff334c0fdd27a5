"""When to stop: frozen rules on a snapshot of the estimate, combined with `|` and `&`.

A rule holds no state, so one object serves any number of runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import rankdata

from honeloom.errors import ConfigError

__all__ = [
    "Budget",
    "RankStability",
    "Snapshot",
    "StandardError",
    "StoppingRule",
    "TopStability",
    "expected_overlap",
    "spearman",
]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An estimate on its way.

    Attributes
    ----------
    evaluations : int
        Spent so far, probes of the noise included.
    value, stderr : ndarray
        Shape (n,), in units of the utility; a standard error that is not known yet is infinite.
    earlier : tuple of ndarray
        Values at the earlier checks, oldest first.
    """

    evaluations: int
    value: FloatArray
    stderr: FloatArray
    earlier: tuple[FloatArray, ...] = ()


class StoppingRule(ABC):
    """A condition on a snapshot; `a | b` holds when either does, `a & b` when both do."""

    @abstractmethod
    def __call__(self, snapshot: Snapshot) -> bool:
        """Whether to stop now."""

    def __or__(self, other: StoppingRule) -> StoppingRule:
        return _Either(self, other)

    def __and__(self, other: StoppingRule) -> StoppingRule:
        return _Both(self, other)


@dataclass(frozen=True, slots=True)
class _Either(StoppingRule):
    first: StoppingRule
    second: StoppingRule

    def __call__(self, snapshot: Snapshot) -> bool:
        return self.first(snapshot) or self.second(snapshot)


@dataclass(frozen=True, slots=True)
class _Both(StoppingRule):
    first: StoppingRule
    second: StoppingRule

    def __call__(self, snapshot: Snapshot) -> bool:
        return self.first(snapshot) and self.second(snapshot)


@dataclass(frozen=True, slots=True)
class Budget(StoppingRule):
    """At least this many evaluations were spent; of use within `&`, since `estimate` has a hard budget of its own."""

    evaluations: int

    def __call__(self, snapshot: Snapshot) -> bool:
        """Whether they are spent."""
        return snapshot.evaluations >= self.evaluations


@dataclass(frozen=True, slots=True)
class StandardError(StoppingRule):
    """A share of the players has a standard error of at most `threshold`.

    A small standard error says nothing about the bias of a truncated or grouped estimate.

    Attributes
    ----------
    threshold : float
        In units of the utility.
    share : float
        Of the players, in (0, 1].
    """

    threshold: float
    share: float = 1.0

    def __call__(self, snapshot: Snapshot) -> bool:
        """Whether enough players are known this well."""
        return bool(np.mean(snapshot.stderr <= self.threshold) >= self.share)


@dataclass(frozen=True, slots=True)
class RankStability(StoppingRule):
    """The ranks agree with those of each of the last `checks` checks.

    Attributes
    ----------
    spearman : float
        Least rank correlation, in [-1, 1].
    checks : int
        How many earlier checks are compared.
    """

    spearman: float = 0.99
    checks: int = 3

    def __call__(self, snapshot: Snapshot) -> bool:
        """Whether the ranks have settled; never while no player is told from another."""
        if len(snapshot.earlier) < self.checks:
            return False
        agreed = [spearman(snapshot.value, old) for old in snapshot.earlier[-self.checks :]]
        return all(a >= self.spearman for a in agreed)


@dataclass(frozen=True, slots=True)
class TopStability(StoppingRule):
    """The best `size` players would mostly be chosen again.

    Attributes
    ----------
    size : int
        Number of players that will be kept.
    overlap : float
        Least expected share of them that a repetition would keep, in (0, 1].
    """

    size: int
    overlap: float = 0.95

    def __call__(self, snapshot: Snapshot) -> bool:
        """Whether the membership is settled."""
        return expected_overlap(snapshot.value, snapshot.stderr, self.size) >= self.overlap


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Rank correlation with mean ranks for ties; 0.0 where one side is constant."""
    ranks = rankdata(a), rankdata(b)
    if any(np.ptp(r) == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def expected_overlap(value: FloatArray, stderr: FloatArray, size: int) -> float:
    """Expected share of the top `size` that a normal redraw of all values keeps.

    With independent errors the redrawn threshold t settles where the expected number above it
    is `size`; player i then stays with probability Phi((value_i - t) / stderr_i).

    Parameters
    ----------
    value, stderr : ndarray
        Shape (n,); an infinite standard error stays with probability 1/2.
    size : int
        Between 1 and n.

    Returns
    -------
    float
        In [0, 1].
    """
    n = len(value)
    if not 1 <= size <= n:
        raise ConfigError(f"TopStability size {size}: must lie between 1 and the {n} players")
    if size == n:
        return 1.0
    order = np.argsort(-value, kind="stable")
    spread = max(float(np.ptp(value)), 1e-300)
    # An error of exactly zero would make the probability a step; a trillionth of the spread is a step in effect.
    error = np.maximum(stderr, 1e-12 * spread)

    def stays(threshold: float) -> FloatArray:
        probability: FloatArray = ndtr((value - threshold) / error)
        return probability

    reach = 40 * float(np.max(error[np.isfinite(error)], initial=spread)) + spread
    low, high = float(value.min()) - reach, float(value.max()) + reach

    def excess(threshold: float) -> float:
        return float(stays(threshold).sum()) - size

    if excess(low) <= 0 or excess(high) >= 0:  # too many unknown players to place a threshold
        return size / n
    return float(stays(brentq(excess, low, high, xtol=1e-15 * reach)).take(order[:size]).mean())
