"""Shapley values by enumeration."""

from __future__ import annotations

from itertools import count as numbers

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError
from honeloom.valuation.designs import order
from honeloom.valuation.game import BoolArray, Design, Estimate, FloatArray, Game

__all__ = ["MAX_PLAYERS", "exact"]

MAX_PLAYERS = 20
_BATCH = 4096


def exact(game: Game) -> Estimate:
    """Weight the marginals of all 2^n coalitions: the mean over sizes of the mean over coalitions of a size.

    A budget below 2^n sees a random part of the coalitions, and failed ones are left out: then
    the means are over what is known and the standard errors grow. What a noisy utility's
    budget holds beyond 2^n repeats all coalitions.

    Parameters
    ----------
    game : Game
        At most 20 players.

    Returns
    -------
    Estimate
        Standard errors from the measured noise and from the marginals that are missing; zero
        without either.

    Raises
    ------
    ConfigError
        More than 20 players.

    References
    ----------
    Shapley 1953, doi:10.1515/9781400881970-018.
    """
    n = game.n_players
    if n > MAX_PLAYERS:
        raise ConfigError(
            f"method 'exact' with {n} players needs 2^{n} evaluations; it takes at most {MAX_PLAYERS}. "
            "Use fewer players, or method 'auto'"
        )
    total, count = np.zeros(1 << n), np.zeros(1 << n, dtype=np.int64)
    for code, value in ((0, game.empty), (len(total) - 1, game.full)):
        if np.isfinite(value):
            total[code], count[code] = value, 1
    return game.run(_enumerate(game, total, count), lambda: _fit(game, total, count))


def _enumerate(game: Game, total: FloatArray, count: npt.NDArray[np.int64]) -> Design:
    """All coalitions that are not known yet, then again and again; player i is bit i of a code."""
    n, size = game.n_players, len(total)
    for lap in numbers():
        codes = np.arange(size, dtype=np.int64)
        if game.budget < size:  # only then does the order matter
            codes = order(size, game.seed, 0)
        if lap == 0:
            codes = codes[count[codes] == 0]
        for part in (codes[i : i + _BATCH] for i in range(0, len(codes), _BATCH)):
            values = yield _members(part, n)
            known = np.isfinite(values)
            total[part[known]] += values[known]
            count[part[known]] += 1
        if game.noise_sd == 0.0 or game.remaining < size:
            return


def _members(codes: npt.NDArray[np.int64], n: int) -> BoolArray:
    inside: BoolArray = (codes[:, None] >> np.arange(n)) & 1 == 1
    return inside


def _fit(game: Game, total: FloatArray, count: npt.NDArray[np.int64]) -> Estimate:
    n, size = game.n_players, len(total)
    values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    codes = np.arange(size, dtype=np.int64)
    sizes = np.bitwise_count(codes).astype(np.int64)
    noise = np.inf if game.noise_sd is None else game.noise_sd
    weight = np.where(count > 0, 1 / np.maximum(count, 1), 0.0)
    rows = []
    for player in range(n):
        without = codes[(codes >> player) & 1 == 0]
        partner = without | (1 << player)
        steps = values[partner] - values[without]
        rows.append(_by_size(steps, sizes[without], weight[partner] + weight[without], noise, n, game.equal_share()))
    value, stderr, seen = (np.array(column) for column in zip(*rows, strict=True))
    return Estimate(value, stderr, seen.astype(np.int64))


def _by_size(
    steps: FloatArray, sizes: npt.NDArray[np.int64], weight: FloatArray, noise: float, n: int, unknown: float
) -> tuple[float, float, int]:
    """Value, standard error and number of marginals of one player."""
    known = np.isfinite(steps)
    if not known.any():
        return unknown, np.inf, 0
    of_size = np.bincount(sizes, minlength=n)
    seen = np.bincount(sizes[known], minlength=n)
    there = seen > 0
    mean = np.bincount(sizes[known], steps[known], minlength=n) / np.maximum(seen, 1)
    squares = np.bincount(sizes[known], (steps[known] - mean[sizes[known]]) ** 2, minlength=n)
    partly = there & (seen < of_size)
    sampling = np.zeros(n)
    spread = np.where(seen > 1, squares / np.maximum(seen - 1, 1), np.inf)[partly]
    sampling[partly] = spread * (1 / seen[partly] - 1 / of_size[partly])
    jitter = 0.0 if noise == 0.0 else noise**2 * np.bincount(sizes[known], weight[known], minlength=n)
    variance = (sampling + jitter / np.maximum(seen, 1) ** 2)[there].sum() / there.sum() ** 2
    if not there.all():  # a whole size is unknown, and nothing says how it differs
        variance = np.inf
    return float(mean[there].mean()), float(np.sqrt(variance)), int(seen.sum())
