"""Shapley values as the mean marginal contribution along random orders of the players."""

from __future__ import annotations

import numpy as np

from honeloom.valuation.chains import FloatArray, chain, marginals, mean_of_marginals
from honeloom.valuation.designs import order
from honeloom.valuation.game import Design, Estimate, Game

__all__ = ["antithetic", "permutation", "truncated"]


def permutation(game: Game) -> Estimate:
    """Average the marginals v(S + i) - v(S) along independent permutations; unbiased.

    A permutation costs n - 1 evaluations, since v(empty) and v(N) are shared. What is left of
    the budget after the last whole permutation is not spent; only a first one may be cut.

    Parameters
    ----------
    game : Game
        The utility and its budget.

    Returns
    -------
    Estimate
        Standard errors from the spread between permutations; infinite for fewer than two.

    References
    ----------
    Castro et al. 2009, doi:10.1016/j.cor.2008.04.004.
    """
    samples: list[FloatArray] = []
    return game.run(_chains(game, samples, reverse=False), lambda: mean_of_marginals(samples, game))


def antithetic(game: Game) -> Estimate:
    """Average over permutations and their reverse; one pair is exact on every quadratic game.

    Parameters
    ----------
    game : Game
        The utility and its budget; a pair costs 2 (n - 1) evaluations.

    Returns
    -------
    Estimate
        Standard errors from the spread between pairs; infinite for fewer than two.

    References
    ----------
    Mitchell et al. 2022, arXiv:2104.12199.
    """
    samples: list[FloatArray] = []
    return game.run(_chains(game, samples, reverse=True), lambda: mean_of_marginals(samples, game))


def truncated(game: Game, *, tolerance: float = 0.01) -> Estimate:
    """Cut every permutation once |v(N) - v(S)| < tolerance |v(N) - v(empty)|; the rest counts as zero.

    That is biased towards zero for players whom late places would show. The cut is looked for
    sixteen times in a permutation, so that evaluations can run side by side in between.

    Parameters
    ----------
    game : Game
        The utility and its budget.
    tolerance : float
        Share of the whole gain, in [0, 1); 0 never cuts and equals `permutation`.

    Returns
    -------
    Estimate
        As for `permutation`.

    References
    ----------
    Ghorbani and Zou 2019, arXiv:1904.02868.
    """
    samples: list[FloatArray] = []
    return game.run(_truncated_chains(game, samples, tolerance), lambda: mean_of_marginals(samples, game))


def _chains(game: Game, samples: list[FloatArray], *, reverse: bool) -> Design:
    n = game.n_players
    inner = np.arange(1, n)
    number = 0
    while n > 1 and (not samples or game.remaining >= (n - 1) * (1 + reverse)):
        players = order(n, game.seed, number)
        orders = [players, players[::-1]] if reverse else [players]
        values = yield np.concatenate([chain(o, inner) for o in orders])
        parts = [marginals(v, inner, o, game) for v, o in zip(np.split(values, len(orders)), orders, strict=True)]
        samples.append(_mean_of_known(parts))
        number += 1
    if n == 1:
        samples.append(np.array([game.full - game.empty]))


def _mean_of_known(parts: list[FloatArray]) -> FloatArray:
    """Mean of a pair; where one half failed, the other stands alone."""
    table = np.array(parts)
    known = np.isfinite(table)
    total = np.where(known, table, 0.0).sum(0)
    mean: FloatArray = np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)
    return mean


def _truncated_chains(game: Game, samples: list[FloatArray], tolerance: float) -> Design:
    n = game.n_players
    inner = np.arange(1, n)
    threshold = tolerance * abs(game.full - game.empty)
    number = 0
    while n > 1 and (not samples or game.remaining >= n - 1):
        players = order(n, game.seed, number)
        values = np.full(n - 1, np.nan)
        # The chain counts from its start, so that a budget that ends within it leaves what was seen.
        samples.append(np.full(n, np.nan))
        for block in np.array_split(inner, min(16, n - 1)):
            values[block - 1] = yield chain(players, block)
            samples[-1] = marginals(values, inner, players, game)
            if abs(game.full - values[block[-1] - 1]) < threshold:
                values[block[-1] :] = values[block[-1] - 1]
                samples[-1] = marginals(values, inner, players, game)
                # The last player's step is the gap itself, which the cut takes for nothing.
                samples[-1][players[-1]] = 0.0
                break
        number += 1
    if n == 1:
        samples.append(np.array([game.full - game.empty]))
