"""Noise first: what repeated evaluations of v(N) and v(empty) promise for a budget."""

from __future__ import annotations

import math

import numpy as np

from honeloom.types.plans import Noise
from honeloom.valuation.game import Estimate, Game

__all__ = ["RESOLVABLE", "achieved_rho", "measure_noise", "predict_rho"]

RESOLVABLE = 0.5
"""Correlation with the true values below which a ranking is called not resolvable."""
MOST_REPEATS = 5


def measure_noise(game: Game, *, most: int) -> Noise:
    """Evaluate v(N) and v(empty), repeatedly while that shows noise, and predict what the budget can do.

    A coalition whose repeats are equal draws no random numbers (a model that is not tuned): it tells
    nothing about the noise and is not repeated further. Where both do, the utility has no noise.

    Parameters
    ----------
    game : Game
        Its `empty`, `full`, `repeats` and `noise_sd` are set.
    most : int
        Most evaluations to spend; 4 are needed to see noise, 10 are spent at most.

    Returns
    -------
    Noise
        In units of the utility.
    """
    n = game.n_players
    both = np.array([[True] * n, [False] * n])
    rounds = [game.evaluate(both)]
    game.full, game.empty = (float(v) for v in rounds[0])
    draws = np.array([True, True])
    while len(rounds) < min(MOST_REPEATS, most // 2) and draws.any():
        again = np.full(2, math.nan)
        again[draws] = game.evaluate(both[draws])
        if len(rounds) == 1:
            draws = ~np.equal(again, rounds[0])
        rounds.append(again)
    table = np.array(rounds)
    known = np.isfinite(table)
    for name, column, valid in zip(("full", "empty"), table.T, known.T, strict=True):
        setattr(game, name, float(column[valid].mean()) if valid.any() else math.nan)
    game.repeats = int(known.sum(0)[draws].min()) if draws.any() else int(known.sum(0).min())
    game.varying_ends = int(draws.sum())
    spread = np.where(known, table - np.array([game.full, game.empty]), 0.0)[:, draws]
    freedom = int((known.sum(0) - 1).clip(min=0)[draws].sum())
    if freedom:
        game.noise_sd = math.sqrt(float((spread**2).sum()) / freedom)
    elif not draws.any():
        game.noise_sd = 0.0
    if not math.isfinite(game.margin):
        return Noise(game.noise_sd, None, None)
    rho = predict_rho(n, game.remaining, noise_sd=game.noise_sd or 0.0, value_sd=abs(game.margin))
    return Noise(game.noise_sd, game.margin, rho)


def predict_rho(n_players: int, evaluations: int, *, noise_sd: float, value_sd: float) -> float:
    """Correlation of true values with the posterior mean from m half-size coalitions.

    For an additive game with normal values of standard deviation t, and evaluations with noise
    s, the share q of the variance that stays unknown solves, for many players,

        q = e / (1 + e),    e = 4 s^2 / (m t^2) + q n / m

    and the correlation is sqrt(1 - q): sqrt(m / n) without noise while m < n. The spread t is
    not known beforehand; the mean margin is a fair guess for it, and a low one where values
    differ in sign.

    Parameters
    ----------
    n_players, evaluations : int
        n and m.
    noise_sd, value_sd : float
        s and t, in units of the utility.

    Returns
    -------
    float
        In [0, 1].

    References
    ----------
    Tulino and Verdu 2004, doi:10.1561/0100000001 (fixed point of linear estimation with random
    designs).
    """
    if evaluations < 1 or value_sd == 0.0:
        return 0.0
    noise = 4 * min(noise_sd / value_sd, 1e9) ** 2 / evaluations
    load = n_players / evaluations
    half = (1 + noise - load) / 2
    root = math.sqrt(half**2 + load * noise)
    unknown = noise / (root + half) if half > 0 else (root - half) / load
    return math.sqrt(min(max(1 - unknown, 0.0), 1.0))


def achieved_rho(estimate: Estimate) -> float | None:
    """Correlation with the true values that an estimate's own standard errors imply; None where they say nothing."""
    if not np.isfinite(estimate.stderr).all():
        return None
    error = float(np.mean(estimate.stderr**2))
    spread = float(np.var(estimate.value))
    if error == 0.0:
        return 1.0
    share = spread / (spread + error) if estimate.shrunk else 1 - error / spread if spread > 0 else 0.0
    return math.sqrt(max(share, 0.0))
