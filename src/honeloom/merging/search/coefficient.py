"""Running merge with a grid of coefficients for each next model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.config import CoefficientConfig
from honeloom.merging.search.racing import Found, Measured, Race, SearchData

__all__ = ["GRID", "coefficient", "grid_walk"]

Values = npt.NDArray[np.float64]
GRID: tuple[float, ...] = CoefficientConfig().grid


def coefficient(
    data: SearchData,
    *,
    grid: Sequence[float] = GRID,
    confidence: float = 0.95,
    margin: float = 0.0,
    racing: bool = True,
) -> Found:
    """From the best single model on, merge each next one with the best coefficient of a grid, if that is better.

    A candidate is w times the merge so far plus 1 - w times the next model, in the order of the single models'
    values. So the weight of the model taken in as the i-th is (1 - w_i) times the product of all later w.

    Parameters
    ----------
    data : SearchData
        N models; at most (N - 1) times the grid's length candidates are measured.
    grid : sequence of float
        Values of w in (0, 1).
    confidence, margin : float
        Of the paired test by which the best of a grid is taken.
    racing : bool
        Stop candidates that are worse after some of the rows.

    Returns
    -------
    Found
        Weights that sum to 1.

    References
    ----------
    Zhao et al. 2024 (Model-GLUE), arXiv:2410.05357.
    """
    race = Race(data, confidence=confidence, margin=margin, racing=racing)
    return grid_walk(race, lambda state, pool: pool[0], grid)


def grid_walk(race: Race, choose: Callable[[Values, list[int]], int], grid: Sequence[float]) -> Found:
    """Take models from a pool, each with the best coefficient of a grid if that is better than the merge so far.

    Parameters
    ----------
    race : Race
        Fresh: its best so far is the best single model, where the walk begins.
    choose : callable
        (weights (N,) of the merge so far, models not yet tried in the order of their values) -> the next of them.
    grid : sequence of float
        Coefficients of the merge so far.
    """
    models, rows = len(race.data.models), race.data.port.groups
    first, *pool = race.by_value
    state: Values = np.eye(models)[first]
    while pool:
        newcomer = choose(state, pool)
        pool.remove(newcomer)
        best: tuple[float, float, Values, Measured] | None = None
        for share in grid:
            if race.left < 1:
                break
            wanted = state * share
            wanted[newcomer] += 1 - share
            measured = race.measure(Candidate.of(wanted, rows=rows), *([best[3]] if best else []))
            # Of equal values the largest share of the merge so far.
            trial = (race.value(measured).value, -share, wanted, measured)
            if race.is_complete(measured) and (best is None or trial[:2] < best[:2]):
                best = trial
        if best and race.settle(best[3]):
            state = best[2]
        if race.left < 1 and pool:
            return race.found("budget")
    return race.found("all models were tried")
