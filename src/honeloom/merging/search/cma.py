"""CMA evolution strategy over merge weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cma
import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError
from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.racing import Found, Race, SearchData
from honeloom.merging.search.surrogate import lowest_of_quadratic
from honeloom.ops.noise import normal

__all__ = ["cma_es"]

Values = npt.NDArray[np.float64]
_LEAST_DENSITY = 0.01


def cma_es(
    data: SearchData,
    *,
    budget: int = 200,
    sigma0: float = 1 / 6,
    popsize: int | None = None,
    patience: int = 10,
    surrogate: bool = True,
    densities: bool = False,
    confidence: float = 0.95,
    margin: float = 0.0,
    racing: bool = True,
) -> Found:
    """Search weights in [0, 1] per model and group of layers by the CMA evolution strategy.

    It begins at equal weights. Candidates of a generation are ranked by their paired difference to the best so far on
    the rows that were measured, so that a candidate that was stopped early still has its rank. At the end the mean of
    the search distribution is measured too, for it is less lucky than any draw.

    Parameters
    ----------
    data : SearchData
        N models, G groups; the variables are G N weights. Where the merge divides by the sum of the weights, so does
        a candidate.
    budget : int
        Candidates measured at most; a budget of the data counts instead.
    sigma0 : float
        First standard deviation.
    popsize : int, optional
        Candidates per generation; 4 + 3 ln n by default.
    patience : int
        Generations without an accepted candidate after which it ends.
    surrogate : bool
        One candidate per generation is the minimum of a quadratic fitted to what was measured: near its optimum a loss
        is one, and the fit averages the noise of many candidates.
    densities : bool
        N further variables: densities in [0.01, 1].
    confidence, margin : float
        Of the paired test by which a candidate becomes the best so far.
    racing : bool
        Stop candidates that are worse after some of the rows.

    Returns
    -------
    Found
        `stopped` is "budget", "patience" or the library's own reason, such as tolfun.

    Raises
    ------
    ConfigError
        Densities of a merge method that has none.

    References
    ----------
    Hansen 2016, arXiv:1604.00772; Hansen 2019 (surrogates), doi:10.1145/3321707.3321842; Zhao et al. 2024
    (Model-GLUE), arXiv:2410.05357.
    """
    if densities and data.density is None:
        raise ConfigError("densities: the merge method has no density; set densities: false")
    race = Race(data, confidence=confidence, margin=margin, racing=racing, budget=budget)
    start = _start(data, densities)
    race.challenge(_candidate(data, start, densities))
    strategy = _strategy(data.seed, start, sigma0, popsize)
    known = _Known()
    stale, stopped = 0, ""
    while not stopped and race.left > strategy.popsize:  # one is kept for the mean
        lowest = known.lowest() if surrogate else None
        drawn = [np.asarray(x, dtype=np.float64) for x in strategy.ask(strategy.popsize - (lowest is not None))]
        drawn += [] if lowest is None else [lowest]
        reference, accepted = race.incumbent, False
        for x in drawn:
            measured, better = race.challenge(_candidate(data, x, densities))
            known.add(x, race.level(measured, reference), len(measured.values))
            accepted |= better
        strategy.tell(drawn, known.levels[-len(drawn) :])
        stale = 0 if accepted else stale + 1
        stopped = "patience" if stale >= patience else next(iter(strategy.stop()), "")
    if race.left >= 1:
        race.challenge(_candidate(data, np.asarray(strategy.result.xfavorite), densities))
    return race.found(stopped or "budget")


@dataclass(slots=True)
class _Known:
    """Every candidate drawn so far, its level, and the rows behind that."""

    points: list[Values] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)

    def add(self, point: Values, level: float, rows: int) -> None:
        self.points.append(point)
        self.levels.append(level)
        self.rows.append(float(rows))

    def lowest(self) -> Values | None:
        """Where a quadratic fitted to them is lowest."""
        if not self.points:
            return None
        return lowest_of_quadratic(np.array(self.points), np.array(self.levels), np.array(self.rows))


def _start(data: SearchData, densities: bool) -> Values:
    """Equal weights: where only ratios count, in the middle of the range."""
    models = len(data.models)
    weights = np.full(data.port.groups * models, 0.5 if data.averages else 1 / models)
    return np.append(weights, [data.density] * models if densities else [])


def _candidate(data: SearchData, x: Values, densities: bool) -> Candidate:
    models = len(data.models)
    count = data.port.groups * models
    table = np.clip(x[:count], 0.0, 1.0).reshape(data.port.groups, models)
    found = Candidate.of(table, np.clip(x[count:], _LEAST_DENSITY, 1.0).tolist() if densities else ())
    return found.normalised() if data.averages else found


def _strategy(seed: int, start: Values, sigma0: float, popsize: int | None) -> Any:
    options = {
        "bounds": [0.0, 1.0],
        "popsize": popsize or 4 + int(3 * math.log(len(start))),
        "randn": _stream(seed),
        "seed": math.nan,  # the library must not touch numpy's global generator
        "verbose": -9,
        "verb_log": 0,
        "verb_disp": 0,
    }
    return cma.CMAEvolutionStrategy(start, sigma0, options)


def _stream(seed: int) -> Callable[..., Values]:
    """Standard normal numbers (lam, n), each used once."""
    used = 0

    def draw(lam: int, n: int = 1) -> Values:
        nonlocal used
        numbers: Values = normal(seed, "search/cma", lam * n, start=used).double().numpy().reshape(lam, n)
        used += lam * n
        return numbers

    return draw
