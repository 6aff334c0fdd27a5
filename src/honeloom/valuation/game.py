"""A utility with its players, its budget and its ledger: what every estimator works on."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from honeloom.valuation.executors import Executor, Outcome, Task, Utility
from honeloom.valuation.ledger import Ledger
from honeloom.valuation.stopping import Snapshot, StoppingRule

__all__ = ["Design", "Estimate", "Fit", "Game"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

Design = Generator[BoolArray, FloatArray, None]
"""Yields coalitions, shape (m, n), and is sent their values, shape (m,); NaN where there is none."""

MAX_FAILING = 0.05
"""Share of failed evaluations above which the budget is spent no further, once 10 have failed."""


class Fit(Protocol):
    """Turns what a design has collected so far into an estimate."""

    def __call__(self) -> Estimate:
        """Return the estimate; must not change what was collected."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Values of the players.

    Attributes
    ----------
    value, stderr : ndarray
        Shape (n,), in units of the utility; an unknown standard error is infinite.
    count : ndarray
        Shape (n,), how many evaluations or marginals a value rests on.
    shrunk : bool
        Whether the value is a posterior mean, so that its spread lacks what the errors hold.
    """

    value: FloatArray
    stderr: FloatArray
    count: IntArray
    shrunk: bool = False


class Game:
    """A cooperative game whose evaluations cost.

    Parameters
    ----------
    utility : callable
        Value of a coalition.
    n_players : int
        Players are 0..n-1.
    budget : int
        Most evaluations. One that the ledger holds, or that a utility without noise would only
        repeat, is not called again but counts, so that a resumed run takes the same way.
    seed : int
        Of the designs.
    executor : Executor
        Calls the utility.
    ledger : Ledger or None
        Holds what was paid for.
    stop : StoppingRule or None
        Looked at after every batch.
    surrogate : ndarray or None
        Cheap values of the players, shape (n,), for `control_variate`.

    Attributes
    ----------
    spent : int
        Evaluations so far.
    empty, full : float
        Mean v(empty) and v(N); NaN until measured, and where every attempt failed.
    repeats : int
        How many evaluations each of the two is the mean of, if repeats of it differ.
    varying_ends : int
        How many of the two differ from repeat to repeat, 0 to 2.
    noise_sd : float or None
        Of one evaluation; None where nothing was repeated.
    """

    def __init__(
        self,
        utility: Utility,
        n_players: int,
        *,
        budget: int,
        seed: int,
        executor: Executor,
        ledger: Ledger | None = None,
        stop: StoppingRule | None = None,
        surrogate: FloatArray | None = None,
    ) -> None:
        self.utility, self.n_players, self.budget, self.seed = utility, n_players, budget, seed
        self.surrogate = surrogate
        self.spent, self.failed = 0, 0
        self.empty, self.full = np.nan, np.nan
        self.repeats, self.varying_ends = 0, 2
        self.noise_sd: float | None = None
        self._executor, self._ledger, self._stop = executor, ledger, stop
        self._repeats: dict[tuple[int, ...], int] = {}
        self._values: dict[tuple[int, ...], float] = {}
        self._reason = ""

    @property
    def remaining(self) -> int:
        """Evaluations that may still be spent; none once too many have failed."""
        return 0 if self._failing() else self.budget - self.spent

    @property
    def first_error(self) -> str:
        """Why the first evaluation that failed did; empty where none did."""
        return self._reason

    @property
    def margin(self) -> float:
        """Mean value of a player, (v(N) - v(empty)) / n; NaN where either is unknown."""
        return (self.full - self.empty) / self.n_players

    @property
    def margin_variance(self) -> float:
        """Variance of `margin` by the noise of its two ends; 0.0 where no noise is known."""
        return self.varying_ends * ((self.noise_sd or 0.0) / self.n_players) ** 2 / max(self.repeats, 1)

    def evaluate(self, coalitions: BoolArray) -> FloatArray:
        """Return v of every coalition, NaN for failures and for what the budget no longer covers.

        Parameters
        ----------
        coalitions : ndarray
            Shape (m, n), True for members.

        Returns
        -------
        ndarray
            Shape (m,), in the given order whatever the executor.
        """
        values = np.full(len(coalitions), np.nan)
        tasks = [self._task(row) for row in coalitions[: self.remaining]]
        self.spent += len(tasks)
        for place, outcome in enumerate(self._outcomes(tasks)):
            if outcome.value is not None:
                values[place] = outcome.value
                continue
            self.failed += 1
            self._reason = self._reason or outcome.error or ""
        return values

    def run(self, design: Design, fit: Fit) -> Estimate:
        """Evaluate a design batch by batch until it, the budget or the stopping rule ends it, and fit."""
        earlier: list[FloatArray] = []
        batch = next(design, None)
        while batch is not None and self.remaining > 0:
            values = self.evaluate(batch)
            try:
                batch = design.send(values)
            except StopIteration:
                break
            if self._stop is not None:
                estimate = fit()
                if self._stop(Snapshot(self.spent, estimate.value, estimate.stderr, tuple(earlier))):
                    break
                earlier.append(estimate.value)
        design.close()
        self._warn_of_failures()
        return fit()

    def equal_share(self) -> float:
        """Value of a player of whom nothing is known: the mean, or 0.0 where that is unknown too."""
        return float(self.margin) if np.isfinite(self.margin) else 0.0

    def _task(self, row: npt.NDArray[np.bool_]) -> Task:
        members = tuple(np.flatnonzero(row).tolist())
        repeat = 0 if self.noise_sd == 0.0 else self._repeats.get(members, 0)
        self._repeats[members] = repeat + 1
        return Task(members, repeat)

    def _outcomes(self, tasks: list[Task]) -> list[Outcome]:
        found: list[Outcome | None] = [self._recorded(t) for t in tasks]
        first = {task: i for i, task in reversed(list(enumerate(tasks))) if found[i] is None}
        todo = sorted(first.values())
        for index, outcome in self._executor.map_utilities(self.utility, [tasks[i] for i in todo]):
            place = todo[index]
            if self._ledger is not None:
                self._ledger.put(tasks[place], outcome)
            found[place] = outcome
        outcomes = [found[first[t]] if o is None else o for o, t in zip(found, tasks, strict=True)]
        complete = [o for o in outcomes if o is not None]
        for task, outcome in zip(tasks, complete, strict=True):
            if task.repeat == 0 and outcome.value is not None:
                self._values[task.members] = outcome.value
        return complete

    def _recorded(self, task: Task) -> Outcome | None:
        if self.noise_sd == 0.0 and task.members in self._values:
            return Outcome(self._values[task.members])
        return None if self._ledger is None else self._ledger.get(task)

    def _failing(self) -> bool:
        return self.failed > max(MAX_FAILING * self.spent, 9)

    def _warn_of_failures(self) -> None:
        if not self.failed:
            return
        stopped = f"; that is more than {MAX_FAILING:.0%}, so no more were made" if self._failing() else ""
        warnings.warn(
            f"{self.failed} of {self.spent} evaluations failed and were left out{stopped}. The first: {self._reason}",
            stacklevel=4,
        )
