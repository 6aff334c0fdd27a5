"""Closed form Shapley values of a nearest-neighbour utility."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError
from honeloom.valuation.game import Estimate, Game

__all__ = ["KnnUtility", "knn", "knn_shapley"]

FloatArray = npt.NDArray[np.float64]


class KnnUtility:
    """Agreement of queries with their nearest members, at most K of them, summed, divided by K, and averaged.

    Parameters
    ----------
    distance : array
        Shape (queries, n); equal distances go by the players' numbers.
    agreement : array
        Shape (queries, n), how well a player's label fits a query, in [0, 1]: 1 for the same
        label, or the probability of it.
    k : int
        Neighbours, 1 or more; may exceed n.
    """

    def __init__(self, distance: npt.ArrayLike, agreement: npt.ArrayLike, k: int) -> None:
        self.distance = np.array(distance, dtype=np.float64, ndmin=2)
        self.agreement = np.array(agreement, dtype=np.float64, ndmin=2)
        self.k = k
        if self.distance.shape != self.agreement.shape:
            raise ConfigError(
                f"distance {self.distance.shape} and agreement {self.agreement.shape}: need the same shape (queries, n)"
            )
        if k < 1 or not (np.isfinite(self.distance).all() and np.isfinite(self.agreement).all()):
            raise ConfigError(f"k {k} must be 1 or more, and distance and agreement must be finite")

    def __call__(self, coalition: frozenset[int]) -> float:
        """Return v of a coalition; 0.0 for the empty one."""
        members = sorted(coalition)
        if not members:
            return 0.0
        near = np.argsort(self.distance[:, members], axis=1, kind="stable")[:, : self.k]
        agreed = np.take_along_axis(self.agreement[:, members], near, axis=1)
        return float((agreed.sum(1) / self.k).mean())


def knn(game: Game) -> Estimate:
    """Return the exact Shapley values of a `KnnUtility`; no evaluation is needed.

    Parameters
    ----------
    game : Game
        Its utility must be a `KnnUtility` of as many players.

    Returns
    -------
    Estimate
        Standard errors are zero.

    Raises
    ------
    ConfigError
        Another utility.

    References
    ----------
    Jia et al. 2019, arXiv:1908.08619.
    """
    utility = game.utility
    if not isinstance(utility, KnnUtility) or utility.distance.shape[1] != game.n_players:
        raise ConfigError(
            f"method 'knn' has a closed form only for a KnnUtility of {game.n_players} players, not for "
            f"{type(utility).__name__}; use method 'auto', or pass a KnnUtility's values as `surrogate`"
        )
    value = knn_shapley(utility)
    return Estimate(value, np.zeros(game.n_players), np.zeros(game.n_players, dtype=np.int64))


def knn_shapley(utility: KnnUtility) -> FloatArray:
    """Shapley values by the recursion from the farthest player to the nearest.

    With players sorted by distance, a the agreement, and N players,

        s_N = a_N / max(K, N),    s_i = s_(i+1) + (a_i - a_(i+1)) / K * min(K, i) / i

    and the mean over queries is taken. The sum is v(N) - v(empty), for K above N too.

    Returns
    -------
    ndarray
        Shape (n,).

    References
    ----------
    Jia et al. 2019, arXiv:1908.08619, theorem 1, with the last term right for K > N.
    """
    queries, n = utility.distance.shape
    order = np.argsort(utility.distance, axis=1, kind="stable")
    agreed = np.take_along_axis(utility.agreement, order, axis=1)
    place = np.arange(1, n)
    steps = (agreed[:, :-1] - agreed[:, 1:]) / utility.k * np.minimum(utility.k, place) / place
    last = agreed[:, -1:] / max(utility.k, n)
    # Sums from the far end: column i holds s_N plus the steps i..N-1.
    values = np.concatenate([np.cumsum(steps[:, ::-1], axis=1)[:, ::-1] + last, last], axis=1)
    spread = np.empty((queries, n))
    np.put_along_axis(spread, order, values, axis=1)
    mean: FloatArray = spread.mean(0)
    return mean
