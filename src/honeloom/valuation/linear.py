"""Linear models of a utility on membership: the ridge solver, and what the designs that use it share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.linalg import svd

from honeloom.valuation.game import Design, Estimate, Game

__all__ = ["Collected", "Ridge", "collect", "fit_differences", "fit_values", "ridge"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

PENALTIES = np.concatenate(([0.0], np.logspace(-8, 2, 41)))
"""Ridge penalties tried, in units of the mean squared singular value; at the last one nothing is left to rank."""


@dataclass(slots=True)
class Collected:
    """Coalitions and their values so far, in planned order; a design appends."""

    rows: list[BoolArray] = field(default_factory=list)
    values: list[FloatArray] = field(default_factory=list)

    def all(self, n_players: int) -> tuple[BoolArray, FloatArray]:
        """Return rows (m, n) and values (m,), NaN where an evaluation failed."""
        if not self.rows:
            return np.zeros((0, n_players), dtype=np.bool_), np.zeros(0)
        return np.concatenate(self.rows), np.concatenate(self.values)


def collect(batches: Iterator[BoolArray], into: Collected, game: Game) -> Design:
    """Follow a stream of coalitions to the end of the budget, keeping what comes back."""
    while game.remaining > 0:
        rows = next(batches)[: game.remaining]
        values = yield rows
        into.rows.append(rows)
        into.values.append(values)


@dataclass(frozen=True, slots=True)
class Ridge:
    """A ridge fit.

    Attributes
    ----------
    slope, variance : ndarray
        Shape (n,), the penalised coefficients and their posterior variances; these hold what
        the shrinkage leaves out, and that the penalty is not known.
    free, free_variance : ndarray
        Shape (f,), the coefficients without penalty.
    """

    slope: FloatArray
    variance: FloatArray
    free: FloatArray
    free_variance: FloatArray


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """Rows = left diag(scale) right and the target along left, free columns taken out of both."""

    left: FloatArray
    scale: FloatArray
    right: FloatArray
    along: FloatArray
    residual: FloatArray
    free_leverage: FloatArray
    freedom: int

    def penalties(self) -> FloatArray:
        """Penalties to try, ascending."""
        return PENALTIES * (float((self.scale**2).mean()) if len(self.scale) else 1.0)

    def shrink(self, penalty: float) -> FloatArray:
        """Share of each direction's least squares coefficient that stays."""
        return self.scale**2 / (self.scale**2 + penalty)

    def slope(self, penalty: float) -> FloatArray:
        """Coefficients, shape (n,)."""
        slope: FloatArray = self.right.T @ (self.along * self.shrink(penalty) / self.scale)
        return slope


def ridge(rows: FloatArray, target: FloatArray, free: FloatArray) -> Ridge:
    """Least squares with the penalty chosen by the closed form of leave-one-out.

    The left-out residual of row j is r_j / (1 - h_j) with the leverage h of the whole fit; one
    singular value decomposition serves every penalty. Columns of `free` are not penalised. The
    variances average the posteriors of all penalties by their restricted likelihood, since a
    choice that happens to be too strong or too weak would make them far too small.

    Parameters
    ----------
    rows : ndarray
        Shape (m, n), each summing to zero, so that the slopes do too.
    target : ndarray
        Shape (m,).
    free : ndarray
        Shape (m, f), of full rank, f < m may be 0.

    Returns
    -------
    Ridge
        In units of the target.

    References
    ----------
    Golub, Heath and Wahba 1979, doi:10.1080/00401706.1979.10489751; for the errors Wahba 1983,
    doi:10.1111/j.2517-6161.1983.tb01239.x; Harville 1974, doi:10.1093/biomet/61.2.383.
    """
    basis, triangle = np.linalg.qr(free)
    residual = target - basis @ (basis.T @ target)
    left, scale, right = svd(rows - basis @ (basis.T @ rows), full_matrices=False)
    kept = scale > 1e-10 * max(float(scale.max(initial=0.0)), 1e-300)
    left, scale, right = left[:, kept], scale[kept], right[kept]
    freedom = len(target) - free.shape[1]
    spectrum = _Spectrum(left, scale, right, left.T @ residual, residual, (basis**2).sum(1), freedom)
    penalty = _best_penalty(spectrum)
    slope = spectrum.slope(penalty)
    variance, noise = _variances(spectrum, penalty, slope)
    inverse = np.linalg.inv(triangle)
    return Ridge(
        slope, variance, inverse @ (basis.T @ (target - rows @ slope)), noise * np.asarray((inverse**2).sum(1))
    )


def _best_penalty(spectrum: _Spectrum) -> float:
    """The penalty with the least mean squared left-out residual; the smallest of equals."""
    squares = spectrum.left**2
    penalties = spectrum.penalties()
    best, least = float(penalties[-1]), np.inf
    for penalty in penalties:
        shrink = spectrum.shrink(penalty)
        slack = 1 - spectrum.free_leverage - squares @ shrink
        if slack.min() < 1e-9:  # a row that the fit must go through cannot be left out
            continue
        error = float((((spectrum.residual - spectrum.left @ (shrink * spectrum.along)) / slack) ** 2).mean())
        if error < least:
            best, least = float(penalty), error
    return best


def _variances(spectrum: _Spectrum, chosen: float, slope: FloatArray) -> tuple[FloatArray, float]:
    """Variance of every coefficient, and of the noise."""
    total, rank, n = float((spectrum.residual**2).sum()), len(spectrum.scale), len(slope)
    outside = max(total - float((spectrum.along**2).sum()), 0.0)
    weights = (spectrum.right**2).T
    if chosen == 0.0:
        noise = outside / max(spectrum.freedom - rank, 1)
        return noise * (weights @ (1 / spectrum.scale**2)), noise
    likelihood, posterior, noises = [], [], []
    for penalty in spectrum.penalties()[1:]:
        kept = 1 - spectrum.shrink(penalty)
        quadratic = max(outside + float((kept * spectrum.along**2).sum()), 1e-28 * total, 1e-300)
        likelihood.append(float(np.log(kept).sum()) / 2 - spectrum.freedom / 2 * np.log(quadratic))
        noises.append(quadratic / spectrum.freedom)
        # Rows that sum to zero say nothing, and need nothing, along the sum of the players.
        known = weights @ (1 / (spectrum.scale**2 + penalty) - 1 / penalty)
        spread = np.maximum((1 - 1 / n) / penalty + known, 0.0)
        posterior.append(noises[-1] * spread + (spectrum.slope(penalty) - slope) ** 2)
    share = np.exp(np.array(likelihood) - max(likelihood))
    share /= share.sum()
    return np.asarray(share @ np.array(posterior)), float(share @ np.array(noises))


def fit_values(game: Game, rows: BoolArray, values: FloatArray, surrogate: FloatArray | None = None) -> Estimate:
    """Regress values on membership: a free curve of the size, and shrunk deviations.

    Rows are centred, so what depends on the size alone is no part of any player's value, and
    fitting it only takes out noise. The players' mean is not regressed but
    (v(N) - v(empty)) / n, so the values sum to the gain.

    Parameters
    ----------
    game : Game
        For the mean.
    rows, values : ndarray
        Shapes (m, n) and (m,); NaN values are left out.
    surrogate : ndarray or None
        Shape (n,); a free multiple of it is taken before anything is shrunk.
    """
    known = np.isfinite(values)
    centred, sizes = _centred(rows[known])
    return _fit(game, centred, values[known], [np.ones(len(sizes)), sizes, sizes**2], surrogate)


def fit_differences(game: Game, rows: BoolArray, values: FloatArray) -> Estimate:
    """Regress half the differences between coalitions and their complements.

    Interactions of even order cancel in them, and so does every even curve of the size. The
    mean is taken out first; an odd curve of the size is fitted too, except where its three terms
    are what least squares would lack.

    Parameters
    ----------
    game : Game
        For the mean.
    rows, values : ndarray
        Shapes (2 m, n) and (2 m,), every coalition followed by its complement; a pair with a
        failure is left out.
    """
    whole = 2 * (len(values) // 2)
    differences = (values[0:whole:2] - values[1:whole:2]) / 2
    known = np.isfinite(differences)
    centred, sizes = _centred(rows[0:whole:2][known])
    target = differences[known] - game.n_players * game.equal_share() * sizes / 2
    affordable = len(target) >= game.n_players + 3 or 30 <= len(target) < game.n_players - 1
    curve = [sizes, sizes**3, sizes**5] if affordable else []
    estimate = _fit(game, centred, target, curve, None)
    return Estimate(estimate.value, estimate.stderr, 2 * estimate.count, estimate.shrunk)


def _centred(rows: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Membership less its mean within each row, and sizes from -1 to 1."""
    membership = rows.astype(np.float64)
    share = membership.mean(1)
    return membership - share[:, None], 2 * share - 1


def _fit(
    game: Game, centred: FloatArray, target: FloatArray, curve: list[FloatArray], surrogate: FloatArray | None
) -> Estimate:
    n, m = game.n_players, len(target)
    count = np.full(n, m, dtype=np.int64)
    free = _independent(curve, m)
    given = np.zeros(n) if surrogate is None else surrogate - surrogate.mean()
    with_surrogate = _independent([*free.T, centred @ given], m)
    told = with_surrogate.shape[1] > free.shape[1]
    if m < with_surrogate.shape[1] + 2:  # nothing is left to fit or to judge a fit by
        return Estimate(game.equal_share() + given, np.full(n, np.inf), count, shrunk=True)
    fitted = ridge(centred, target, with_surrogate)
    deviation, variance = fitted.slope - fitted.slope.mean(), fitted.variance + game.margin_variance
    if told:
        deviation = deviation + fitted.free[-1] * given
        variance = variance + fitted.free_variance[-1] * given**2
    return Estimate(game.equal_share() + deviation, np.sqrt(variance), count, shrunk=True)


def _independent(columns: list[FloatArray], m: int) -> FloatArray:
    """Stack columns, leaving out those that the ones before them already span; shape (m, f)."""
    kept = np.zeros((m, 0))
    for column in columns:
        basis = np.linalg.qr(kept)[0]
        rest = column - basis @ (basis.T @ column)
        if np.linalg.norm(rest) > 1e-9 * np.linalg.norm(column):
            kept = np.column_stack([kept, column])
    return kept
