"""Banzhaf values by maximum sample reuse."""

from __future__ import annotations

import numpy as np

from honeloom.valuation.designs import bernoulli
from honeloom.valuation.game import Estimate, Game
from honeloom.valuation.linear import Collected, collect

__all__ = ["banzhaf"]


def banzhaf(game: Game) -> Estimate:
    """Mean value of the coalitions with a player less the mean of those without.

    Coalitions are drawn by a fair coin per player, so one evaluation serves every player. The
    values do not sum to v(N) - v(empty).

    Parameters
    ----------
    game : Game
        The utility and its budget.

    Returns
    -------
    Estimate
        Unbiased for the Banzhaf values, standard errors of a difference of two means: about
        2 sd(v) / sqrt(m). A player that was always in, or never, gets the equal share.

    References
    ----------
    Wang and Jia 2023, arXiv:2205.15466.
    """
    found = Collected()
    design = collect(bernoulli(game.n_players, game.seed), found, game)
    return game.run(design, lambda: _fit(game, found))


def _fit(game: Game, found: Collected) -> Estimate:
    rows, values = found.all(game.n_players)
    known = np.isfinite(values)
    inside = rows[known].astype(np.float64)
    level = float(values[known].mean()) if known.any() else 0.0
    centred = values[known] - level  # sums of squares of small differences, not of large values
    with_it, without = _moments(inside, centred), _moments(1 - inside, centred)
    seen = (with_it[0] > 0) & (without[0] > 0)
    value = np.where(seen, with_it[1] - without[1], game.equal_share())
    stderr = np.sqrt(with_it[2] + without[2])
    return Estimate(value, stderr, np.full(game.n_players, len(centred), dtype=np.int64))


def _moments(
    inside: np.ndarray[tuple[int, int], np.dtype[np.float64]], values: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Count, mean, and variance of the mean of the values inside, per player; shape (3, n)."""
    count = inside.sum(0)
    mean = inside.T @ values / np.maximum(count, 1)
    squares = np.maximum(inside.T @ values**2 - count * mean**2, 0.0)
    variance = np.where(count > 1, squares / np.maximum(count - 1, 1) / np.maximum(count, 1), np.inf)
    return np.stack([count, mean, variance])
