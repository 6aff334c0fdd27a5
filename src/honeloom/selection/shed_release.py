"""What SHED's release computes, with its faults: to compare with, never to choose by."""

from __future__ import annotations

import numpy as np

from honeloom.ops.noise import permutation
from honeloom.valuation.chains import chain
from honeloom.valuation.game import Design, Estimate, Game

__all__ = ["released_values"]

GROUPS = 50


def released_values(game: Game, *, group_size: int | None = None) -> Estimate:
    """Sum the losses of groups over permutations as the released script does.

    Three faults, each told by data of the release: v(empty) is taken for zero, so that the last
    group of a permutation receives it; nothing is divided by the size of a group or the number
    of permutations; and the first permutation is left out (arXiv:2405.00705).

    Parameters
    ----------
    game : Game
        `full` must have been measured.
    group_size : int or None
        Players per group; None means n / 50, at least 1.
    """
    n = game.n_players
    size = min(group_size or max(1, n // GROUPS), n)
    bounds = (n - np.arange(size, n, size))[::-1]
    total = np.zeros(n)
    count = np.zeros(n, dtype=np.int64)

    def design() -> Design:
        number = 0
        while len(bounds) and (number < 2 or game.remaining >= len(bounds)):
            order = permutation(game.seed, f"shed/{number}", n).numpy()
            values = yield chain(order, bounds)
            if number > 0 and np.isfinite(values).all():
                steps = np.diff(np.concatenate(([0.0], values, [game.full])))
                total[order] += np.repeat(steps, np.diff(np.concatenate(([0], bounds, [n]))))
                count[:] += 1
            number += 1

    return game.run(design(), lambda: Estimate(total.copy(), np.full(n, np.inf), count.copy()))
