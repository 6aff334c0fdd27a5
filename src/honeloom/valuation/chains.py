"""Chains of growing coalitions, and the mean of the marginals along them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from honeloom.valuation.game import Estimate, Game

__all__ = ["chain", "marginals", "mean_of_marginals"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


def chain(order: IntArray, bounds: IntArray) -> BoolArray:
    """Coalitions of the first bounds[k] players of an order.

    Parameters
    ----------
    order : ndarray
        Shape (n,), a permutation.
    bounds : ndarray
        Shape (k,), sizes.

    Returns
    -------
    ndarray
        Shape (k, n), bool.
    """
    place = np.argsort(order, kind="stable")
    inside: BoolArray = place[None, :] < bounds[:, None]
    return inside


def marginals(values: FloatArray, bounds: IntArray, order: IntArray, game: Game) -> FloatArray:
    """Spread the steps of a chain evenly over the players that each step adds.

    A step beside a failed coalition is unknown; it is left out, never taken for zero.

    Parameters
    ----------
    values : ndarray
        Shape (k,), v of the chain's inner coalitions.
    bounds : ndarray
        Shape (k,), their sizes, ascending.
    order : ndarray
        Shape (n,).
    game : Game
        Gives v(empty) and v(N).

    Returns
    -------
    ndarray
        Shape (n,), NaN where unknown.
    """
    steps = np.diff(np.concatenate(([game.empty], values, [game.full])))
    sizes = np.diff(np.concatenate(([0], bounds, [len(order)])))
    spread = np.empty(len(order))
    spread[order] = np.repeat(steps / sizes, sizes)
    return spread


def mean_of_marginals(samples: Sequence[FloatArray], game: Game) -> Estimate:
    """Mean over chains, with the standard error from their spread; a player without a marginal gets the equal share.

    Parameters
    ----------
    samples : sequence of ndarray
        One (n,) array per independent chain, NaN where unknown.
    game : Game
        For the equal share.
    """
    table = np.array(samples).reshape(len(samples), game.n_players)
    known = np.isfinite(table)
    count = known.sum(0)
    total = np.where(known, table, 0.0).sum(0)
    value = np.where(count > 0, total / np.maximum(count, 1), game.equal_share())
    squares = np.where(known, (table - value) ** 2, 0.0).sum(0)
    variance = squares / np.maximum(count - 1, 1) / np.maximum(count, 1)
    stderr = np.where(count > 1, np.sqrt(variance), np.inf)
    return Estimate(value, stderr, count.astype(np.int64))
