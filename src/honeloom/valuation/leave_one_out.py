"""Leave-one-out values."""

from __future__ import annotations

import numpy as np

from honeloom.valuation.chains import FloatArray
from honeloom.valuation.designs import order
from honeloom.valuation.game import Design, Estimate, Game

__all__ = ["leave_one_out"]


def leave_one_out(game: Game) -> Estimate:
    """v(N) - v(N without i) for every player, averaged over as many rounds as the budget holds.

    Players are visited in random order, so that a budget below n leaves a random part out;
    these get the equal share. A utility without noise is asked once per player.

    Parameters
    ----------
    game : Game
        The utility and its budget.

    Returns
    -------
    Estimate
        Standard errors from the measured noise; zero without noise, infinite where the noise
        is not known.

    References
    ----------
    Cook 1977, doi:10.1080/00401706.1977.10489493.
    """
    n = game.n_players
    total, count = np.zeros(n), np.zeros(n, dtype=np.int64)

    def fit() -> Estimate:
        known = (count > 0) & np.isfinite(game.full)
        value = np.where(known, game.full - total / np.maximum(count, 1), game.equal_share())
        noise = np.inf if game.noise_sd is None else game.noise_sd
        error = noise * np.sqrt(1 / np.maximum(count, 1) + 1 / max(game.repeats, 1))
        return Estimate(value, np.where(known, error, np.inf), count.copy())

    return game.run(_rounds(game, total, count), fit)


def _rounds(game: Game, total: FloatArray, count: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Design:
    players = order(game.n_players, game.seed, 0)
    while game.remaining > 0:
        values = yield ~np.eye(game.n_players, dtype=np.bool_)[players]
        known = np.isfinite(values)
        total[players[known]] += values[known]
        count[players[known]] += 1
        if game.noise_sd == 0.0:
            return
