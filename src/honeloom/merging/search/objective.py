"""What a search makes better: a weighted mean over domains of ratio means, with paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import stats

from honeloom.errors import ConfigError
from honeloom.registry import suggest

__all__ = ["Difference", "Estimate", "Objective"]

Values = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error (infinite where it cannot be told), and the number of rows."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True, slots=True)
class Difference:
    """One value minus another on the same rows, with the standard error of the difference.

    Attributes
    ----------
    freedom : int
        Degrees of freedom behind the standard error.
    """

    value: float
    stderr: float
    freedom: int

    def is_below(self, limit: float, confidence: float) -> bool:
        """Whether the difference is below a limit by a one-sided test."""
        return self.value + self._reach(confidence) < limit

    def is_above(self, limit: float, confidence: float) -> bool:
        """Whether the difference is above a limit by a one-sided test."""
        return self.value - self._reach(confidence) > limit

    def _reach(self, confidence: float) -> float:
        if self.stderr == 0 or confidence == 0.5:
            return 0.0
        return math.inf if self.freedom < 1 else float(stats.t.ppf(confidence, self.freedom)) * self.stderr


@dataclass(frozen=True)
class Objective:
    """Mean over domains of the ratio of summed values to summed row weights; lower is better.

    Attributes
    ----------
    domains : sequence of str
        Of every row.
    weights : mapping
        Of each domain, 0 or more; equal weights if empty. Domains without a weight do not count.

    Raises
    ------
    ConfigError
        A weight names no domain of the rows, is negative, or all are 0.
    """

    domains: Sequence[str]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = sorted(set(self.domains))
        unknown = sorted(set(self.weights) - set(names))
        if unknown:
            raise ConfigError(
                f"weight of domain {unknown[0]!r}: no row has it{suggest(unknown[0], names)} "
                f"(domains: {', '.join(names[:20])})"
            )
        shares = np.array([self.weights.get(n, 0.0) if self.weights else 1.0 for n in names], dtype=np.float64)
        if len(shares) and (shares.min() < 0 or not shares.sum() > 0):
            raise ConfigError(f"weights of domains {dict(self.weights)}: each at least 0 and one above 0")
        places = {name: i for i, name in enumerate(names)}
        codes = np.array([places[d] for d in self.domains], dtype=np.int64)
        object.__setattr__(self, "_shares", shares)
        object.__setattr__(self, "_codes", codes)

    @property
    def codes(self) -> Rows:
        """Number of every row's domain, in the order of the names."""
        codes: Rows = self.__dict__["_codes"]
        return codes

    def estimate(self, values: Values, rows: Rows) -> Estimate:
        """Value of one candidate.

        Parameters
        ----------
        values : ndarray
            (n, 2), per row the summed value and its weight.
        rows : ndarray
            (n,), which rows these are. Domains that they lack do not count.
        """
        value, influence, codes = self._linearised(values, rows)
        stderr, _ = self._error(influence, codes, values[:, 1])
        return Estimate(value, stderr, len(rows))

    def difference(self, one: Values, other: Values, rows: Rows) -> Difference:
        """One candidate minus another on the same rows, each (n, 2).

        Every row's effect on the difference is that on its domain's ratios, to first order; rows count as
        independent within a domain.
        """
        first, influence, codes = self._linearised(one, rows)
        second, others, _ = self._linearised(other, rows)
        stderr, freedom = self._error(influence - others, codes, one[:, 1])
        return Difference(first - second, stderr, freedom)

    def factors(self, weights: Values, rows: Rows) -> Values:
        """What each row's value is multiplied by in the estimate on these rows, (n,), of its weights (n,)."""
        codes = self.codes[rows]
        totals, shares = self._totals(weights, codes)
        safe = np.where(totals > 0, totals, 1.0)
        factors: Values = (shares / safe)[codes]
        return factors

    def _totals(self, weights: Values, codes: Rows) -> tuple[Values, Values]:
        """Summed weights of every domain, and its share of the mean."""
        own: Values = self.__dict__["_shares"]
        totals: Values = np.bincount(codes, weights, minlength=len(own)).astype(np.float64)
        present = np.where(totals > 0, own, 0.0)
        if not present.sum() > 0:
            return totals, present
        return totals, present / present.sum()

    def _linearised(self, values: Values, rows: Rows) -> tuple[float, Values, Rows]:
        codes = self.codes[rows]
        totals, shares = self._totals(values[:, 1], codes)
        safe = np.where(totals > 0, totals, 1.0)
        ratios = np.bincount(codes, values[:, 0], minlength=len(shares)) / safe
        influence = (shares / safe)[codes] * (values[:, 0] - ratios[codes] * values[:, 1])
        return float(shares @ ratios), influence, codes

    def _error(self, influence: Values, codes: Rows, weights: Values) -> tuple[float, int]:
        """Standard error of a sum of influences, and its degrees of freedom.

        A domain with one row cannot tell its variance; it takes the mean of what one row of the others has.
        """
        _, shares = self._totals(weights, codes)
        counts = np.bincount(codes, weights > 0, minlength=len(shares))
        squares = np.bincount(codes, influence**2, minlength=len(shares))
        used = shares > 0
        many, lone = used & (counts > 1), used & (counts == 1)
        if not many.any():
            return math.inf, 0
        variances = squares[many] * counts[many] / (counts[many] - 1)
        total = float(variances.sum())
        if lone.any():
            of_a_row = float(np.mean(variances * counts[many] / shares[many] ** 2))
            total += of_a_row * float((shares[lone] ** 2).sum())
        return math.sqrt(total), int((counts[many] - 1).sum())
