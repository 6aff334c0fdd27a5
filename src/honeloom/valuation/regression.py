"""Ridge regression of the utility on membership in half-size coalitions."""

from __future__ import annotations

from typing import Literal

from honeloom.valuation.designs import bernoulli, half_size, with_complements
from honeloom.valuation.game import Estimate, Game
from honeloom.valuation.linear import Collected, collect, fit_differences, fit_values

__all__ = ["regression"]


def regression(game: Game, *, design: Literal["half", "bernoulli"] = "half", paired: bool = False) -> Estimate:
    """Fit one coefficient per player to coalitions of about half the players, with ridge.

    Every evaluation bears on every player, and a half-size coalition sees the most players
    move at once; so this stands noise best. The penalty is chosen by leave-one-out. The
    coefficients estimate how much a player adds to a random half of the others (its Banzhaf
    value; equal to the Shapley value in additive and quadratic games), moved together so that they sum to
    v(N) - v(empty).

    Parameters
    ----------
    game : Game
        The utility and its budget.
    design : {"half", "bernoulli"}
        Coalitions of exactly n / 2 players, or every player in by a fair coin.
    paired : bool
        Evaluate every coalition's complement too and fit the differences. Right for a utility
        without noise and more than 2 n evaluations.

    Returns
    -------
    Estimate
        Posterior means and standard deviations.

    References
    ----------
    Lin et al. 2022, arXiv:2206.10013; Ilyas et al. 2022, arXiv:2202.00622.
    """
    found = Collected()
    rows = (half_size if design == "half" else bernoulli)(game.n_players, game.seed)

    def fit() -> Estimate:
        if paired:
            return fit_differences(game, *found.all(game.n_players))
        return fit_values(game, *found.all(game.n_players))

    return game.run(collect(with_complements(rows) if paired else rows, found, game), fit)
