"""SHED's estimator: permutations in steps of a group, each step shared evenly."""

from __future__ import annotations

import numpy as np

from honeloom.valuation.chains import FloatArray, chain, marginals, mean_of_marginals
from honeloom.valuation.designs import order
from honeloom.valuation.game import Design, Estimate, Game

__all__ = ["group_permutation"]

GROUPS = 50


def group_permutation(game: Game, *, group_size: int | None = None, debias: bool = True) -> Estimate:
    """Remove the players group by group in random orders, and share each loss evenly within its group.

    With K groups the estimate of an additive game is shrunk to the mean by (K - 1) / (n - 1);
    `debias` divides the deviations and their errors by it. That holds for groups of any sizes.
    v(empty) is measured; taking it for zero would give the last group all of it.

    Parameters
    ----------
    game : Game
        The utility and its budget; a permutation costs K - 1 evaluations.
    group_size : int or None
        Players per group, the last group may be smaller; None means n / 50, at least 1.
    debias : bool
        Whether to undo the shrinkage; the ranks do not change.

    Returns
    -------
    Estimate
        Standard errors from the spread between permutations.

    References
    ----------
    He et al. 2024 (SHED), arXiv:2405.00705.
    """
    n = game.n_players
    size = min(group_size or max(1, n // GROUPS), n)
    removed = np.arange(size, n, size)
    bounds = (n - removed)[::-1]
    shrinkage = len(bounds) / (n - 1) if n > 1 else 1.0
    samples: list[FloatArray] = []

    def fit() -> Estimate:
        raw = mean_of_marginals(samples, game)
        if not debias or not 0 < shrinkage < 1:
            return raw
        mean = raw.value.mean()
        return Estimate(mean + (raw.value - mean) / shrinkage, raw.stderr / shrinkage, raw.count)

    return game.run(_chains(game, samples, bounds), fit)


def _chains(game: Game, samples: list[FloatArray], bounds: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Design:
    number = 0
    while len(bounds) and (not samples or game.remaining >= len(bounds)):
        players = order(game.n_players, game.seed, number)
        values = yield chain(players, bounds)
        samples.append(marginals(values, bounds, players, game))
        number += 1
    if not len(bounds):
        samples.append(np.full(game.n_players, game.margin))
