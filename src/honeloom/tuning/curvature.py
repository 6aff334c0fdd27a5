"""Curvature and batch noise where training begins, by forward passes alone, and the rate that zeroth-order steps bear.

A step moves along random directions, so what it loses by curvature is the trace of the Hessian H and not its
largest eigenvalue: tr H / lambda_max, the effective rank, takes the place of the number of parameters. All of
it is measured with second differences of losses along random signs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.errors import NotFiniteError
from honeloom.tuning.zeroth_order import direction, step_seeds

__all__ = ["BATCHES", "DIRECTIONS", "LADDER", "SAFETY", "Curvature", "Rung", "estimate", "passes_of"]

DIRECTIONS = 6
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Distances that are tried, in units of the weights."""
BATCHES = 8
SAFETY = 1 / 3
"""Share of the best first step's rate. Measured: on losses that are no quadratics curvature grows along the way."""
_RUNG_DIRECTIONS = 3
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rung:
    """What one distance told.

    Attributes
    ----------
    mu : float
        The distance.
    change : float or None
        Relative change of the projected gradients towards the neighbouring distances, the larger one; None where
        a loss was not finite.
    trace : float or None
        Mean second difference: the trace of the Hessian where the loss is a quadratic that far.
    """

    mu: float
    change: float | None
    trace: float | None


@dataclass(frozen=True, slots=True)
class Curvature:
    """What the losses around a point tell of steps from there.

    Attributes
    ----------
    trace, trace_stderr : float
        Of the Hessian (Hutchinson), nats per squared unit of weight; the error is over directions and batches.
    square, cube : float
        Traces of the Hessian's square and cube. Each of their entries is of two batches alone, whose noise adds to
        the first.
    largest, largest_stderr : float
        Estimate of the largest eigenvalue: cube / square is a mean of eigenvalues that is weighted by their squares,
        so its expectation is a lower bound; where few directions make it absurd it is cut to
        [square / trace, sqrt(square)], whose ends are bounds from below (without negative eigenvalues) and from above.
        Without a positive trace it is the upper one.
        The error is a jackknife's over directions.
    gradient, batch : float
        Squared norm of the mean gradient, by products across batches, and mean squared norm of a batch's gradient.
    signal, signal_stderr : float
        gradient / batch: the share that batches agree on. The first may be below 0 where that share is small.
    mu : float
        Distance at which projected gradients change least.
    width : float
        Distance that the second differences were taken at: where they change least.
    ladder : tuple of Rung
        All distances.
    passes : int
        Forward passes of one batch that it took.

    References
    ----------
    Hutchinson 1989, doi:10.1080/03610918908812806; Malladi et al. 2023, arXiv:2305.17333 (effective rank).
    """

    trace: float
    trace_stderr: float
    square: float
    cube: float
    largest: float
    largest_stderr: float
    gradient: float
    batch: float
    signal: float
    signal_stderr: float
    mu: float
    width: float
    ladder: tuple[Rung, ...]
    passes: int

    @property
    def effective_rank(self) -> float | None:
        """The ratio tr H / lambda_max, from above as `largest` is from below; None where H is clearly not positive."""
        return self.trace / self.largest if self.trace >= self.largest > 0 else None

    @property
    def stable_rank(self) -> float | None:
        """The ratio (tr H)^2 / tr H^2: less noisy than the effective rank, and below it for a positive H."""
        return self.trace**2 / self.square if self.trace > 0 and self.trace**2 >= self.square > 0 else None

    @property
    def safe_signal(self) -> float:
        """Signal shrunk by its own error, s^3 / (s^2 + e^2), at least e / 2 and at most 1: small is only slow."""
        shrunk = max(0.0, self.signal) ** 3 / max(self.signal**2 + self.signal_stderr**2, 1e-12)
        return min(1.0, max(shrunk, self.signal_stderr / 2))

    def scale(self, directions: int = 1) -> float:
        """Second-order cost c of a step along averaged directions: lr^2 / 2 c |g|^2.

        A single one costs tr H + 2 lambda_max at most. For signs the second term is smaller, by twice the mean
        of H's diagonal weighted by the squared gradient. That is all of it only where H is diagonal, so it is kept.
        Where negative eigenvalues hide positive ones, as at the zero of LoRA's B, the trace counts as its error or the
        root of tr H^2, which it has at least without them.
        """
        single = max(self.trace, self.trace_stderr, math.sqrt(self.square)) + 2 * self.largest
        return single / directions + (1 - 1 / directions) * self.largest

    def bound(self, directions: int = 1) -> float:
        """Rate from which on steps go up in the mean, even with the gradient of all rows: 2 / scale."""
        return 2 / self.scale(directions) if self.scale(directions) > 0 else math.inf

    def ceiling(self, directions: int = 1) -> float:
        """Rate from which on steps go up in the mean with the gradients of batches; the bound's share by the signal.

        The signal counts with one standard error on top, in the rate's favour.
        """
        return self.bound(directions) * min(1.0, max(0.0, self.signal) + self.signal_stderr)

    def rate(self, directions: int = 1, steps: float | None = None) -> float:
        """The learning rate for steps from here.

        The best first step has signal / scale. `SAFETY` of that is taken, because curvature grows along the way. Over
        many steps batch noise adds up, and sqrt(signal / (1 - signal) / (lambda scale steps)) balances it against what
        is to gain, |g|^2 / (2 lambda): the 1 / sqrt(r T) of the theory. lambda is its upper bound there, the root of
        tr H^2. The smaller one of both.

        Parameters
        ----------
        directions : int
            That a step averages.
        steps : float, optional
            How many there will be; None: few. Where the rate follows a schedule, the sum of its squared shares of the
            largest: a third of them where it falls to 0 on a line.

        Raises
        ------
        ValueError
            No curvature was found, so every rate is as good as any other.
        """
        scale = self.scale(directions)
        if not (scale > 0 and self.largest > 0):
            raise ValueError("the loss has no curvature along any direction, so it tells no rate")
        signal = self.safe_signal
        first = SAFETY * signal / scale
        if steps is None or signal >= 1 or not self.square > 0:
            return first
        return min(first, math.sqrt(signal / (1 - signal) / (math.sqrt(self.square) * scale * steps)))


def passes_of(batches: int, directions: int = DIRECTIONS, rungs: int = len(LADDER)) -> int:
    """Forward passes of a batch that `estimate` takes."""
    tried = min(directions, _RUNG_DIRECTIONS)
    return batches + 2 * (rungs * tried + directions * batches + 2 * math.comb(directions, 2))


def estimate(
    losses: Sequence[Callable[[], float]], params: Mapping[str, torch.Tensor], *, seed: int,
    directions: int = DIRECTIONS, ladder: Sequence[float] = LADDER,
) -> Curvature:  # fmt: skip
    """Measure curvature and batch noise around where `params` are.

    Parameters
    ----------
    losses : sequence of callable
        Of different batches, each with as many rows as a step has, at the tensors as they are; at least two.
    params : mapping
        Tensors by name. They are moved while this runs, and afterwards what they were, to the bit; a copy of them is
        kept in host memory.
    seed : int
        Of the directions, which are signs and never those of a training.
    directions : int
        How many. With m of them there are m (m - 1) / 2 numbers for the trace of the square.
    ladder : sequence of float
        Distances to choose from, ascending; at least three.

    Returns
    -------
    Curvature
        The same numbers for the same seed and losses.

    Raises
    ------
    ValueError
        Fewer than two losses, three directions or three distances.
    NotFiniteError
        A loss is not finite where the tensors are, or at fewer than three distances around.

    References
    ----------
    Malladi et al. 2023, arXiv:2305.17333, section 4 (effective rank); Girard 1989, doi:10.1007/BF01395779.
    """
    if len(losses) < 2 or directions < 3 or len(ladder) < 3:
        raise ValueError("curvature needs at least two batches, three directions and three distances")
    counted = [_Counted(loss) for loss in losses]
    seeds = step_seeds(seed, "curvature", 0, directions)
    with torch.no_grad(), _moving(params) as move:
        middle = np.array([loss() for loss in counted])
        if not np.isfinite(middle).all():
            raise NotFiniteError("the loss is not finite before the first step; look at the rows, or use --dtype fp32")
        around = _Around(counted, middle, seeds, move)
        rungs, mu, width = _climbed(around, ladder)
        first, second = around.singles(width)
        gram = around.gram(width, second)
    return _concluded(first, second, gram, rungs, mu, width, sum(loss.count for loss in counted))


class _Counted:
    """A loss that knows how often it was asked."""

    def __init__(self, loss: Callable[[], float]) -> None:
        self.loss, self.count = loss, 0

    def __call__(self) -> float:
        self.count += 1
        return float(np.mean(self.loss()))


Move = Callable[[Sequence[int], float], None]


@contextmanager
def _moving(params: Mapping[str, torch.Tensor]) -> Iterator[Move]:
    """A function that puts the tensors at their values plus a distance along a sum of directions; and back."""
    kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in sorted(params.items())}

    def move(seeds: Sequence[int], distance: float) -> None:
        for name, values in kept.items():
            z = direction(seeds[0], name, params[name], "rademacher")
            for other in seeds[1:]:
                z.add_(direction(other, name, params[name], "rademacher"))
            params[name].copy_(values)
            params[name].add_(z.mul_(distance / math.sqrt(len(seeds))))

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                params[name].copy_(values)


@dataclass(frozen=True, slots=True)
class _Around:
    """Differences of losses around the point."""

    losses: Sequence[Callable[[], float]]
    middle: _Floats
    seeds: Sequence[int]
    move: Move

    def differences(self, seeds: Sequence[int], distance: float, batches: Sequence[int]) -> tuple[_Floats, _Floats]:
        """First and second differences along a direction, or a pair's sum over sqrt(2), for some batches."""
        sides = []
        for sign in (1, -1):
            self.move(seeds, sign * distance)
            sides.append(np.array([self.losses[b]() for b in batches]))
        plus, minus = sides
        if not np.isfinite(sides).all():
            return np.full_like(plus, np.nan), np.full_like(plus, np.nan)
        return (plus - minus) / (2 * distance), (plus + minus - 2 * self.middle[list(batches)]) / distance**2

    def singles(self, width: float) -> tuple[_Floats, _Floats]:
        """Both differences of every direction and batch, each of shape (directions, batches)."""
        found = [self.differences([seed], width, range(len(self.losses))) for seed in self.seeds]
        first, second = (np.array(part) for part in zip(*found, strict=True))
        _require_finite(second, width)
        return first, second

    def gram(self, width: float, second: _Floats) -> _Floats:
        """z_i' H z_j, shape (directions, directions); every pair has the next two batches, so that cubes mix them."""
        gram, count = np.diag(second.mean(axis=1)), len(self.losses)
        for place, (i, j) in enumerate(itertools.combinations(range(len(self.seeds)), 2)):
            batches = [2 * place % count, (2 * place + 1) % count]
            _, both = self.differences([self.seeds[i], self.seeds[j]], width, batches)
            gram[i, j] = gram[j, i] = (both - (second[i, batches] + second[j, batches]) / 2).mean()
        _require_finite(gram, width)
        return gram


def _require_finite(values: _Floats, width: float) -> None:
    if not np.isfinite(values).all():
        raise NotFiniteError(f"a loss at distance {width:g} is not finite; use --dtype fp32, or give lr and mu")


def _climbed(around: _Around, ladder: Sequence[float]) -> tuple[tuple[Rung, ...], float, float]:
    """The rungs, and the distances at which first and second differences of a batch change least.

    Rounding shows on the small side and third and fourth derivatives on the large one.
    """
    seeds = around.seeds[:_RUNG_DIRECTIONS]
    found = np.array([[around.differences([seed], mu, [0]) for seed in seeds] for mu in ladder])[..., 0]
    usable = [bool(np.isfinite(rung).all()) for rung in found]
    known = [k for k, fine in enumerate(usable) if fine]
    if len(known) < 3:
        raise NotFiniteError(f"losses around the start are finite at {len(known)} distances; use --dtype fp32")
    changes = [_changes(found[known, :, part]) for part in (0, 1)]
    chosen = [ladder[known[1 + int(np.argmin(change[1:-1]))]] for change in changes]
    by_place = dict(zip(known, zip(changes[0], found[known, :, 1].mean(axis=1), strict=True), strict=True))
    rungs = tuple(
        Rung(mu, *(float(v) for v in by_place[k])) if k in by_place else Rung(mu, None, None)
        for k, mu in enumerate(ladder)
    )
    return rungs, chosen[0], chosen[1]


def _changes(values: _Floats) -> _Floats:
    """Of each row, the relative distance to the row before and the one after, the larger one."""
    norms = np.linalg.norm(values, axis=1)
    apart = np.linalg.norm(np.diff(values, axis=0), axis=1)
    largest = np.maximum(norms[1:], norms[:-1])
    steps = np.divide(apart, largest, out=np.zeros_like(apart), where=largest > 0)
    changes: _Floats = np.maximum(np.concatenate([[0.0], steps]), np.concatenate([steps, [0.0]]))
    return changes


def _concluded(
    first: _Floats, second: _Floats, gram: _Floats, rungs: tuple[Rung, ...], mu: float, width: float, passes: int
) -> Curvature:
    """Statistics of the differences."""
    trace, trace_error = float(second.mean()), _two_way(np.mean, second)
    square, cube = _moments(gram)
    gradient, batch = _gradients(first)
    return Curvature(
        trace=trace, trace_stderr=trace_error, square=square, cube=cube, largest=_largest(gram),
        largest_stderr=_jackknife([_largest(np.delete(np.delete(gram, i, 0), i, 1)) for i in range(len(gram))]),
        gradient=gradient, batch=batch, signal=_signal(first), signal_stderr=_two_way(_signal, first),
        mu=mu, width=width, ladder=rungs, passes=passes,
    )  # fmt: skip


def _moments(gram: _Floats) -> tuple[float, float]:
    """Traces of the square and the cube from products z_i' H z_j of different directions."""
    m = len(gram)
    off = gram - np.diag(np.diag(gram))
    square = float((off**2).sum()) / (m * (m - 1))
    cube = float(np.trace(off @ off @ off)) / (m * (m - 1) * (m - 2)) if m > 2 else 0.0
    return square, cube


def _largest(gram: _Floats) -> float:
    """Cube over square, within its bounds."""
    square, cube = _moments(gram)
    if not square > 0:
        return 0.0
    trace = float(np.trace(gram)) / len(gram)
    upper = math.sqrt(square)
    lower = min(upper, square / trace) if trace > 0 else upper
    return min(upper, max(lower, cube / square))


def _gradients(first: _Floats) -> tuple[float, float]:
    """Squared norm of the mean gradient, and mean squared norm of a batch's, from projections of (m, batches)."""
    batches = first.shape[1]
    squares = (first**2).sum(axis=1)
    across = (first.sum(axis=1) ** 2 - squares) / (batches * (batches - 1))
    return float(across.mean()), float(squares.mean() / batches)


def _signal(first: _Floats) -> float:
    """Share of the second number that is the first; 1 where there are no gradients at all."""
    gradient, batch = _gradients(first)
    return gradient / batch if batch > 0 else 1.0


def _jackknife(parts: Sequence[float]) -> float:
    """Standard error from what is left without each one of the observations."""
    n = len(parts)
    return math.sqrt((n - 1) / n * float(np.square(np.array(parts) - np.mean(parts)).sum()))


def _two_way(statistic: Callable[[Any], Any], values: _Floats) -> float:
    """Standard error of a statistic of a table whose rows and columns are both drawn; batches need three."""
    errors = [_jackknife([float(statistic(np.delete(values, i, 0))) for i in range(len(values))])]
    if values.shape[1] > 2:
        errors.append(_jackknife([float(statistic(np.delete(values, b, 1))) for b in range(values.shape[1])]))
    return math.hypot(*errors)
