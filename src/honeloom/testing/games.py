"""Cooperative games with known values, and noise for them: the oracle of every estimator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from honeloom.ops import noise

__all__ = [
    "Game",
    "Noisy",
    "additive",
    "airport",
    "banzhaf_by_enumeration",
    "benchmark_game",
    "glove",
    "majority",
    "pairwise",
    "saturating",
    "shapley_by_enumeration",
    "unanimity",
    "weighted_voting",
]

FloatArray = npt.NDArray[np.float64]
Kind = Literal["additive", "pairwise", "saturating"]


@dataclass(frozen=True)
class Game:
    """A utility with its exact values; calling it evaluates a coalition.

    Attributes
    ----------
    value : callable
        Members, ascending, -> v.
    shapley, banzhaf : ndarray or None
        Shape (n,); None where no formula is at hand.
    """

    n_players: int
    value: Callable[[list[int]], float]
    shapley: FloatArray | None = None
    banzhaf: FloatArray | None = None

    def __call__(self, coalition: frozenset[int]) -> float:
        """Return v of a coalition."""
        return self.value(sorted(coalition))


@dataclass(frozen=True)
class Noisy:
    """A game whose every evaluation has independent normal noise.

    The noise follows from the seed, the coalition and the repeat number, so it is the same
    wherever and in whatever order evaluations run.

    Attributes
    ----------
    game : callable
        Of a coalition.
    sd : float
        Of the noise, in units of the utility.
    seed : int
        Of the noise.
    """

    game: Callable[[frozenset[int]], float]
    sd: float
    seed: int = 0

    def __call__(self, coalition: frozenset[int]) -> float:
        """Return the first draw for a coalition."""
        return self.evaluate(coalition, 0)

    def evaluate(self, coalition: frozenset[int], repeat: int) -> float:
        """Return the draw number `repeat` for a coalition."""
        members = np.array(sorted(coalition), dtype="<i8").tobytes()
        name = f"{repeat}/{hashlib.blake2b(members, digest_size=16).hexdigest()}"
        (share,) = noise.keyed_uniform(self.seed, "games/noise", [name])
        return self.game(coalition) + self.sd * float(ndtri(share + 2.0**-54))


def additive(weights: Sequence[float] | FloatArray, empty: float = 0.0) -> Game:
    """v(S) = empty + sum of weights; Shapley and Banzhaf values are the weights."""
    w = np.array(weights, dtype=np.float64)
    return Game(len(w), partial(_sum, w, empty), w.copy(), w.copy())


def pairwise(weights: Sequence[float] | FloatArray, interactions: FloatArray, empty: float = 0.0) -> Game:
    """v(S) = empty + w.m + m'Qm / 2; both values are w_i + sum_j Q_ij / 2.

    Parameters
    ----------
    weights : array
        Shape (n,).
    interactions : ndarray
        Q, shape (n, n), symmetric with zero diagonal.
    """
    w, q = np.array(weights, dtype=np.float64), np.array(interactions, dtype=np.float64)
    phi = w + q.sum(1) / 2
    return Game(len(w), partial(_quadratic, w, q, empty), phi, phi.copy())


def saturating(weights: Sequence[float] | FloatArray, rate: float, height: float = 1.0, empty: float = 0.0) -> Game:
    """v(S) = empty + height (1 - exp(-rate sum of weights)).

    With a_i = exp(-rate w_i) the multilinear extension of the exponential is prod (1 - t + t a_j).
    The Banzhaf value is its slope at t = 1/2, the Shapley value the slope's integral over t,
    here by Gauss-Legendre quadrature with 128 nodes.

    References
    ----------
    Owen 1972, doi:10.1287/mnsc.18.5.64.
    """
    w = np.array(weights, dtype=np.float64)
    a = np.exp(-rate * w)
    nodes, masses = np.polynomial.legendre.leggauss(128)

    def slope(t: float) -> FloatArray:
        factors = 1 - t + t * a
        result: FloatArray = height * (1 - a) * np.exp(np.log(factors).sum() - np.log(factors))
        return result

    shapley = np.sum([m / 2 * slope((t + 1) / 2) for t, m in zip(nodes, masses, strict=True)], axis=0)
    return Game(len(w), partial(_saturated, w, rate, height, empty), shapley, slope(0.5))


def benchmark_game(kind: Kind, n_players: int, seed: int) -> Game:
    """One of the three games of `benchmarks/valuation`.

    Weights are 0.15 x_i / sum x with x exponential, and a random quarter of the signs turned
    and halved; v(empty) is 0.3. "pairwise" adds m'Qm / 2 with Q symmetric, zero diagonal, normal
    entries of sd 1e-5; "saturating" is 0.3 + 0.15 (1 - exp(-20 sum of weights)).

    Parameters
    ----------
    kind : {"additive", "pairwise", "saturating"}
    n_players, seed : int
        The game follows from them.
    """
    x = -np.log1p(-noise.uniform(seed, "games/weights", n_players).numpy())
    turned = noise.permutation(seed, "games/signs", n_players).numpy()[: n_players // 4]
    x[turned] *= -0.5
    weights = 0.15 * x / x.sum()
    if kind == "additive":
        return additive(weights, empty=0.3)
    if kind == "saturating":
        return saturating(weights, rate=20.0, height=0.15, empty=0.3)
    draws = ndtri(noise.uniform(seed, "games/interactions", n_players**2).numpy() + 2.0**-54)
    upper = np.triu(1e-5 * draws.reshape(n_players, n_players), 1)
    return pairwise(weights, upper + upper.T, empty=0.3)


def glove(left: int, right: int) -> Game:
    """v(S) = pairs of left (first players) and right gloves in S; values by enumeration."""
    return _enumerated(left + right, partial(_pairs, left))


def unanimity(n_players: int, needed: Sequence[int]) -> Game:
    """v(S) = 1 if S holds all that are needed: Shapley 1/t and Banzhaf 2^(1-t) for these t, 0 for the others."""
    needs = frozenset(needed)
    inside = np.isin(np.arange(n_players), sorted(needs)).astype(np.float64)
    return Game(
        n_players,
        partial(_holds, needs),
        inside / len(needs),
        inside * 2.0 ** (1 - len(needs)),
    )


def majority(n_players: int) -> Game:
    """v(S) = 1 for more than half of the players: Shapley 1/n, Banzhaf C(n-1, floor(n/2)) / 2^(n-1)."""
    pivotal = comb(n_players - 1, n_players // 2) / 2 ** (n_players - 1)
    return Game(
        n_players,
        partial(_most, n_players),
        np.full(n_players, 1 / n_players),
        np.full(n_players, pivotal),
    )


def weighted_voting(quota: float, votes: Sequence[float]) -> Game:
    """v(S) = 1 if the votes of S reach the quota; values by enumeration."""
    return _enumerated(len(votes), partial(_carries, tuple(votes), quota))


def airport(costs: Sequence[float]) -> Game:
    """v(S) = the greatest cost in S; a player pays its share of every stretch of runway it needs.

    References
    ----------
    Littlechild and Owen 1973, doi:10.1287/mnsc.20.3.370.
    """
    c = np.array(costs, dtype=np.float64)
    order = np.argsort(c, kind="stable")
    stretches = np.diff(np.concatenate(([0.0], c[order])))
    shapley = np.empty(len(c))
    shapley[order] = np.cumsum(stretches / np.arange(len(c), 0, -1))
    return Game(len(c), partial(_greatest, c), shapley)


def shapley_by_enumeration(n_players: int, value: Callable[[list[int]], float]) -> FloatArray:
    """Shapley values from the definition, coalition by coalition; for small n."""
    return _by_enumeration(n_players, value, lambda size: 1 / (n_players * comb(n_players - 1, size)))


def banzhaf_by_enumeration(n_players: int, value: Callable[[list[int]], float]) -> FloatArray:
    """Banzhaf values from the definition, coalition by coalition; for small n."""
    return _by_enumeration(n_players, value, lambda size: 1 / 2 ** (n_players - 1))


def _by_enumeration(n: int, value: Callable[[list[int]], float], weight: Callable[[int], float]) -> FloatArray:
    phi = np.zeros(n)
    for player in range(n):
        others = [i for i in range(n) if i != player]
        for size in range(n):
            for members in combinations(others, size):
                phi[player] += weight(size) * (value(sorted((*members, player))) - value(list(members)))
    return phi


# Utilities are functions of the module, so that a game can be sent to other processes.


def _sum(weights: FloatArray, empty: float, members: list[int]) -> float:
    return float(empty + weights[members].sum())


def _quadratic(weights: FloatArray, interactions: FloatArray, empty: float, members: list[int]) -> float:
    return float(empty + weights[members].sum() + interactions[np.ix_(members, members)].sum() / 2)


def _saturated(weights: FloatArray, rate: float, height: float, empty: float, members: list[int]) -> float:
    return float(empty - height * np.expm1(-rate * weights[members].sum()))


def _pairs(left: int, members: list[int]) -> float:
    lefts = sum(i < left for i in members)
    return float(min(lefts, len(members) - lefts))


def _holds(needed: frozenset[int], members: list[int]) -> float:
    return float(needed <= frozenset(members))


def _most(n_players: int, members: list[int]) -> float:
    return float(2 * len(members) > n_players)


def _carries(votes: tuple[float, ...], quota: float, members: list[int]) -> float:
    return float(sum(votes[i] for i in members) >= quota)


def _greatest(costs: FloatArray, members: list[int]) -> float:
    return float(costs[members].max(initial=0.0))


def _enumerated(n: int, value: Callable[[list[int]], float]) -> Game:
    return Game(n, value, shapley_by_enumeration(n, value), banzhaf_by_enumeration(n, value))
