"""Ports that answer from a formula, for the tests of search methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.objective import Objective
from honeloom.merging.search.racing import SearchData


class FormulaPort:
    """Scores f(weights (G, N)) plus a fixed noise per row and, by `spread`, per row and candidate.

    The noise per row is common to all candidates, as the difficulty of a row is.
    """

    def __init__(
        self,
        value: Callable[[np.ndarray], float],
        models: int,
        rows: int = 4,
        *,
        groups: int = 1,
        difficulty: float = 0.0,
        spread: float = 0.0,
        slope: Callable[[np.ndarray], np.ndarray] | None = None,
        seed: int = 0,
    ) -> None:
        dice = np.random.default_rng(seed)
        self.models = [f"m{i}" for i in range(models)]
        self.groups = groups
        self.value, self.slope = value, slope
        self.difficulty = difficulty * dice.standard_normal(rows)
        self.directions = spread * dice.standard_normal((rows, models))
        self.measured: list[Candidate] = []
        self.rows_measured = 0
        self.rows = rows

    def single(self, model: int, rows: Sequence[int]) -> np.ndarray:
        return self._values(np.eye(len(self.models))[[model] * self.groups], rows)

    def measure(self, candidate: Candidate, rows: Sequence[int]) -> np.ndarray:
        self.measured.append(candidate)
        self.rows_measured += len(rows)
        return self._values(candidate.array, rows)

    def gradient(self, candidate: Candidate, rows: Sequence[int], factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._values(candidate.array, rows), float(factors.sum()) * self.slope(candidate.array)

    def _values(self, weights: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        picked = np.array(rows, dtype=np.int64)
        values = self.value(weights) + self.difficulty[picked] + self.directions[picked] @ weights.mean(axis=0)
        return np.stack([values, np.ones(len(picked))], axis=1)

    def data(self, **settings: Any) -> SearchData:
        rows = range(self.rows)
        singles = np.stack([self.single(k, rows) for k in range(len(self.models))])
        return SearchData(self, settings.pop("objective", Objective(["d"] * self.rows)), singles, **settings)
