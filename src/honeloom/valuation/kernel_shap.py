"""Shapley values by constrained least squares on pairs of complements."""

from __future__ import annotations

from honeloom.valuation.designs import half_size, kernel_size, with_complements
from honeloom.valuation.game import Estimate, Game
from honeloom.valuation.linear import Collected, collect, fit_differences

__all__ = ["kernel_shap"]


def kernel_shap(game: Game) -> Estimate:
    """Least squares under the Shapley kernel, with sum v(N) - v(empty).

    Sizes are drawn with the kernel's weights 1 / (s (n - s)), so the rows count equally; every
    coalition comes with its complement. Deviations from the mean are shrunk by a ridge penalty
    that leave-one-out chooses, which goes to zero where the evaluations suffice.

    Parameters
    ----------
    game : Game
        The utility and its budget.

    Returns
    -------
    Estimate
        Posterior means and standard deviations. The values sum to v(N) - v(empty), and
        converge to the Shapley values.

    References
    ----------
    Lundberg and Lee 2017, arXiv:1705.07874; Covert and Lee 2021, arXiv:2012.01536.
    """
    found = Collected()
    n = game.n_players
    sizes = kernel_size(n, game.seed) if n > 1 else half_size(n, game.seed)  # one player has no proper coalition
    return game.run(collect(with_complements(sizes), found, game), lambda: fit_differences(game, *found.all(n)))
