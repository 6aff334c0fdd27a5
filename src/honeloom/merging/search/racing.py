"""Measuring candidates against the best so far, on no more rows than it takes to tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.objective import Difference, Estimate, Objective
from honeloom.ops.noise import permutation
from honeloom.types.ports import CandidatePort

__all__ = ["Found", "Measured", "Race", "SearchData", "Step", "race_order", "rung_sizes"]

Values = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the rows after which a candidate may be stopped."""
_LEAST = 8
_STOPPING = 0.9
"""Least confidence of a stop: who accepts on little evidence should not reject on less."""
_ROUNDING = 1e-6
"""Relative differences below it are those of sums in another order: rows are not always computed in the same batch."""


def _silent(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class SearchData:
    """What a search works on.

    Attributes
    ----------
    port : CandidatePort
        Measures candidates.
    objective : Objective
        Of all rows.
    singles : ndarray
        (N, n, 2): what every model scores alone, known beforehand.
    averages : bool
        Whether the merge method divides by the sum of the weights, so that only their ratios count.
    density : float or None
        The merge method's own density; None if it has none.
    similarity : ndarray or None
        (N, N), symmetric.
    seed : int
        Of all random choices.
    budget : int or None
        Candidates measured at most; None leaves it to the method.
    say : callable
        Told what a person may want to know.
    """

    port: CandidatePort
    objective: Objective
    singles: Values
    averages: bool = True
    density: float | None = None
    similarity: Values | None = None
    seed: int = 0
    budget: int | None = None
    say: Callable[[str], None] = _silent

    @property
    def models(self) -> Sequence[str]:
        """N names."""
        return self.port.models


@dataclass(frozen=True, slots=True)
class Measured:
    """Values (m, 2) of a candidate on the first m rows of the race's order, and its place in the trace."""

    candidate: Candidate
    values: Values
    place: int = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One measured candidate.

    Attributes
    ----------
    candidate : Candidate
        It.
    rows : int
        How many rows were measured; fewer than all if it was stopped.
    value : float
        On these rows.
    difference, stderr : float
        To the best so far on the same rows; a standard error that cannot be told is infinite.
    accepted : bool
        Whether it became the best so far.
    """

    candidate: Candidate
    rows: int
    value: float
    difference: float
    stderr: float
    accepted: bool

    def to_json(self) -> dict[str, Any]:
        """As an object without infinities."""
        stderr = self.stderr if math.isfinite(self.stderr) else None
        return {
            **self.candidate.to_json(), "rows": self.rows, "value": self.value, "difference": self.difference,
            "stderr": stderr, "accepted": self.accepted,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes
    ----------
    candidate : Candidate
        The best found.
    value : Estimate
        On all rows; the search chose by them, so it flatters.
    evaluations, rows_evaluated : int
        Candidates measured, and rows over all of them; the single models are not counted.
    trace : tuple of Step
        Every candidate in order.
    stopped : str
        Why it ended.
    single : str or None
        Name of the best single model, if no merge is better than it.
    """

    candidate: Candidate
    value: Estimate
    evaluations: int
    rows_evaluated: int
    trace: tuple[Step, ...]
    stopped: str
    single: str | None = None


def race_order(objective: Objective, seed: int) -> Rows:
    """All rows in a random order whose every beginning has about the same share of each domain, (n,)."""
    codes = objective.codes
    keys = np.empty(len(codes), dtype=np.float64)
    for code in range(int(codes.max(initial=-1)) + 1):
        members = np.flatnonzero(codes == code)
        shuffled = members[permutation(seed, f"search/rows/{code}", len(members)).numpy()]
        keys[shuffled] = (np.arange(len(members)) + 0.5) / len(members)
    order: Rows = np.lexsort((codes, keys)).astype(np.int64)
    return order


def rung_sizes(rows: int, domains: int) -> list[int]:
    """Numbers of rows after which a candidate may be stopped; two of a domain at least, on average."""
    least = max(_LEAST, 2 * domains)
    return sorted({min(rows, max(least, math.ceil(share * rows))) for share in RUNGS})


class Race:
    """The best candidate so far, and the measurements by which others may take its place.

    The best single model is the best to begin with.

    Parameters
    ----------
    data : SearchData
        Port, objective and what the single models score.
    confidence, margin : float
        A candidate replaces the best if it is better by a one-sided paired test at this confidence, and by at least
        the margin.
    racing : bool
        Stop a candidate after a rung if it is worse beyond the confidence, or so near that all rows could not show it
        to be better; otherwise all rows are measured.
    budget : int or None
        Candidates measured at most.
    """

    def __init__(
        self, data: SearchData, *, confidence: float, margin: float, racing: bool, budget: int | None = None
    ) -> None:
        n = len(data.objective.codes)
        if data.singles.shape != (len(data.models), n, 2) or n == 0:
            raise ValueError(f"singles are {data.singles.shape}; need ({len(data.models)}, {n}, 2), and a row")
        self.data = data
        self.order = race_order(data.objective, data.seed)
        self.rungs = rung_sizes(n, len(set(data.objective.codes.tolist()))) if racing else [n]
        self.trace: list[Step] = []
        self.rows_evaluated = 0
        self._gradients = 0
        self._confidence, self._margin = confidence, margin
        self._budget = data.budget if data.budget is not None else budget
        self.single_values = tuple(data.objective.estimate(v, np.arange(n)).value for v in data.singles)
        names = list(data.models)
        self.by_value = sorted(range(len(names)), key=lambda k: (self.single_values[k], names[k]))
        best = self.by_value[0]
        start = Candidate.single(best, len(names), data.port.groups)
        self.single = self.incumbent = Measured(start, data.singles[best][self.order])

    @property
    def evaluations(self) -> int:
        """Candidates measured so far, and gradients taken."""
        return len(self.trace) + self._gradients

    def count_gradient(self, rows: int) -> None:
        """Count a gradient on some rows as an evaluation."""
        self._gradients += 1
        self.rows_evaluated += rows

    @property
    def left(self) -> float:
        """Evaluations that may still be made."""
        return math.inf if self._budget is None else self._budget - self.evaluations

    def challenge(self, candidate: Candidate, *rivals: Measured) -> tuple[Measured, bool]:
        """Measure a candidate; whether it replaced the best so far.

        It is stopped early if it is worse than the best so far, or than a rival.
        """
        measured = self.measure(candidate, *rivals)
        return measured, self.settle(measured)

    def measure(self, candidate: Candidate, *rivals: Measured) -> Measured:
        """Measure and record a candidate, as far as it may still be the best; `settle` may make it so."""
        values, done = np.empty((len(self.order), 2)), 0
        for rung in self.rungs:
            rows = self.order[done:rung]
            values[done:rung] = self.data.port.measure(candidate, rows.tolist())
            self.rows_evaluated += rung - done
            done = rung
            if self._is_lost(Measured(candidate, values[:done]), rivals):
                break
        measured = Measured(candidate, values[:done].copy(), len(self.trace))
        difference = self.compare(measured, self.incumbent)
        value = self.value(measured).value
        self.trace.append(Step(candidate, done, value, difference.value, difference.stderr, accepted=False))
        return measured

    def settle(self, measured: Measured) -> bool:
        """Let a measured candidate replace the best so far, if it is better beyond noise; whether it did."""
        accepted = self.is_complete(measured) and self._is_better(self.compare(measured, self.incumbent))
        if accepted:
            self.incumbent = measured
            self.trace[measured.place] = replace(self.trace[measured.place], accepted=True)
        return accepted

    def compare(self, one: Measured, other: Measured) -> Difference:
        """One minus the other on the rows that both have."""
        m = min(len(one.values), len(other.values))
        return self.data.objective.difference(one.values[:m], other.values[:m], self.order[:m])

    def value(self, measured: Measured) -> Estimate:
        """Value on the rows measured."""
        return self.data.objective.estimate(measured.values, self.order[: len(measured.values)])

    def level(self, measured: Measured, reference: Measured) -> float:
        """Value on all rows as far as it is known: that of a reference, plus the difference on common rows."""
        return self.value(reference).value + self.compare(measured, reference).value

    def _is_lost(self, known: Measured, rivals: Sequence[Measured]) -> bool:
        """Whether a candidate is worse than a rival, or could not be shown to be better than the best on all rows.

        The latter: even if the true difference is as good as its interval allows, the test on all rows would fail, for
        its standard error shrinks with the root of the rows.
        """
        confidence = max(self._confidence, _STOPPING)
        if any(self.compare(known, rival).is_above(0.0, confidence) for rival in rivals):
            return True
        gap = self.compare(known, self.incumbent)
        share = len(known.values) / len(self.order)
        return replace(gap, stderr=gap.stderr * (1 - math.sqrt(share))).is_above(0.0, confidence)

    def is_complete(self, measured: Measured) -> bool:
        """Whether all rows were measured."""
        return len(measured.values) == len(self.order)

    def _is_better(self, difference: Difference) -> bool:
        least = max(self._margin, _ROUNDING * abs(self.value(self.incumbent).value))
        return difference.is_below(0.0, self._confidence) and difference.value <= -least

    def found(self, stopped: str) -> Found:
        """The best so far; the best single model if that is not worse beyond noise."""
        best, single = self.incumbent, None
        if best is self.single or not self._is_better(self.compare(best, self.single)):
            best, single = self.single, self.data.models[self.by_value[0]]
            self.data.say(f"search: no merge is better than {single} alone beyond noise")
        return Found(
            best.candidate, self.value(best), self.evaluations, self.rows_evaluated, tuple(self.trace), stopped, single
        )
