"""A surrogate's values, corrected by real evaluations."""

from __future__ import annotations

from honeloom.errors import ConfigError
from honeloom.valuation.designs import half_size
from honeloom.valuation.game import Estimate, Game
from honeloom.valuation.linear import Collected, collect, fit_values

__all__ = ["control_variate"]


def control_variate(game: Game) -> Estimate:
    """Take a fitted multiple of cheap values, and regress what they leave unexplained.

    The surrogate is an additive game u(S) = sum of its values over S, whose Shapley values are
    those values. With c by least squares, the value is c u_i plus the ridge estimate of the
    residual v - c u on half-size coalitions. So a good surrogate ranks more players than there
    are evaluations, and a useless one costs one degree of freedom.

    Parameters
    ----------
    game : Game
        With `surrogate`, shape (n,), in any unit and of either sign.

    Returns
    -------
    Estimate
        Posterior means and standard deviations; their sum is v(N) - v(empty).

    Raises
    ------
    ConfigError
        No surrogate was given.

    References
    ----------
    Goldwasser and Hooker 2023, arXiv:2310.07672.
    """
    surrogate = game.surrogate
    if surrogate is None:
        raise ConfigError(
            "method 'control_variate' needs cheap values of the players: estimate(..., surrogate=[one number each]); "
            "without any, use method 'regression'"
        )
    found = Collected()
    design = collect(half_size(game.n_players, game.seed), found, game)
    return game.run(design, lambda: fit_values(game, *found.all(game.n_players), surrogate))
