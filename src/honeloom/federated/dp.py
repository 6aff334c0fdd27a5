"""Differential privacy of zeroth-order steps: of a client's rows, the scalars alone tell anything, and they are noised.

Neighbours are data sets where one row is added or taken away. Each step draws every row with probability q by itself;
each row drawn gives g_i = (L_i(theta + mu z) - L_i(theta - mu z)) / (2 mu), clipped to [-C, C], and the client
sends

    (sum_i clip(g_i) + N(0, (sigma C)^2)) / (q n).

One row moves the sum by C at most, so that a scalar is a Gaussian mechanism of noise multiplier sigma on a Poisson
sample, and D directions on one sample are one of sigma / sqrt(D). The scalar of a batch's mean, clipped to [-C, C] and
given the same noise, would be something else: there one row can move it from -C to C, twice as far, and its noise would
have to be that of a whole batch's scalar rather than of one row's share in it.

The number of rows n, the settings and the seeds of the directions count as public.

Zhang et al. 2024 (DPZero), arXiv:2310.09639; Tang et al. 2024 (private fine-tuning with zeroth-order optimization),
arXiv:2401.04343.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from honeloom.errors import ConfigError, MissingExtraError

__all__ = [
    "Draws", "PrivateScalar", "Release", "check_budget", "epsilon", "epsilon_of", "noise_for", "poisson_rows",
    "secret_generator",
]  # fmt: skip

Floats = npt.NDArray[np.float64]
ORDERS = (*range(2, 64), *(1 << k for k in range(6, 13)))
"""Of Renyi divergences: whole ones, whose sums are finite."""
HOPELESS = 100.0
"""An epsilon that promises nothing; beyond it the slower, tighter bound would need gigabytes."""
LEAST, MOST = 0.1, 1e7
"""Noise multipliers of a step that are taken: with less, a drawn row's scalar is as good as in the clear."""
FINEST, COARSEST = 1e-6, 1e-4
"""Grids of privacy losses, in nats; the coarsest is the library's own."""


class Draws(Protocol):
    """Where random numbers come from; `numpy.random.Generator` is one."""

    def random(self, size: int) -> Floats:
        """Uniform in [0, 1), shape (size,)."""
        ...

    def standard_normal(self) -> float:
        """One number of mean 0 and variance 1."""
        ...


class _SystemDraws:
    """Numbers from the system's secure source."""

    def __init__(self) -> None:
        self._source = random.SystemRandom()

    def random(self, size: int) -> Floats:
        words = np.frombuffer(secrets.token_bytes(8 * size), dtype="<u8") >> np.uint64(11)
        return words.astype(np.float64) * 2.0**-53

    def standard_normal(self) -> float:
        return self._source.normalvariate(0.0, 1.0)


def secret_generator(seed: int | None = None) -> Draws:
    """Random numbers for samples and noise.

    Whoever can guess them takes the noise off. Without a seed they come from the operating system's secure source;
    with one, from a generator that anybody can repeat, for simulations and tests.

    This does not hold against attacks on the last bits: noise in doubles leaves gaps between the numbers it can give,
    by which a released number may tell what it hides (Mironov 2012, doi:10.1145/2382196.2382264). Scalars are rounded
    to float32 before they are sent, which narrows that without a proof. Nor does it hold against someone who
    measures how long a draw takes, or who reads the client's memory.
    """
    return _SystemDraws() if seed is None else np.random.default_rng(seed)


def poisson_rows(n: int, q: float, rng: Draws) -> npt.NDArray[np.int64]:
    """A sample that has each of n rows with probability q, whatever the others: ascending places, maybe none.

    The accounting is for these samples only; batches of a fixed size from a shuffled list have another bound.
    """
    if not 0 < q <= 1:
        raise ConfigError(f"sampling rate {q}: must be over 0 and at most 1")
    return np.flatnonzero(rng.random(n) < q).astype(np.int64)


@dataclass(frozen=True, slots=True)
class PrivateScalar:
    """The noised scalar of one direction, from the losses of the rows of one Poisson sample.

    Parameters
    ----------
    clip : float
        C, largest magnitude of a row's scalar, in loss per unit along the direction.
    noise : float
        sigma, standard deviation of the noise in units of C.
    expected : float
        q n, rows in a sample on average. Dividing by the rows really drawn would tell how many they are.
    mu : float
        Distance to both sides.
    rng : Draws
        Of the noise; `secret_generator()`.

    Raises
    ------
    ConfigError
        A number that is not finite and over 0.

    References
    ----------
    Zhang et al. 2024 (DPZero), arXiv:2310.09639.
    """

    clip: float
    noise: float
    expected: float
    mu: float
    rng: Draws

    def __post_init__(self) -> None:
        for name in ("clip", "noise", "expected", "mu"):
            _positive(name, getattr(self, name))

    def __call__(self, plus: npt.ArrayLike, minus: npt.ArrayLike) -> float:
        """The scalar.

        Parameters
        ----------
        plus, minus : float64 (b,)
            Losses of each row on both sides, in nats; b may be 0, and there is noise all the same. A row whose
            scalar is NaN or infinite counts as 0.
        """
        first, second = (np.asarray(side, dtype=np.float64) for side in (plus, minus))
        if first.ndim != 1 or first.shape != second.shape:
            raise ValueError(f"losses of shapes {first.shape} and {second.shape}; both sides have one for each row")
        with np.errstate(invalid="ignore", over="ignore"):
            scalars = (first - second) / (2 * self.mu)
        kept = np.clip(np.where(np.isfinite(scalars), scalars, 0.0), -self.clip, self.clip)
        drawn = self.noise * self.clip * self.rng.standard_normal()
        return (math.fsum(kept) + drawn) / self.expected


@dataclass(frozen=True, slots=True)
class Release:
    """Steps that were taken alike: noise multiplier, sampling rate, how many, and directions a step.

    Raises
    ------
    ConfigError
        A number out of its bounds.
    """

    noise: float
    rate: float
    steps: int
    directions: int = 1

    def __post_init__(self) -> None:
        _positive("noise", self.noise)
        if not 0 < self.rate <= 1:
            raise ConfigError(f"sampling rate {self.rate}: must be over 0 and at most 1; it is rows per step / rows")
        if self.steps < 1 or self.directions < 1:
            raise ConfigError(f"{self.steps} steps of {self.directions} directions: must be 1 or more")
        if self.multiplier < LEAST:
            raise ConfigError(
                f"noise {self.noise:g} over {self.directions} directions: a step's noise multiplier must be {LEAST} or "
                f"more; raise noise to {LEAST * math.sqrt(self.directions):.3g} at least"
            )

    @property
    def multiplier(self) -> float:
        """Of a step: its directions are one vector, whose sensitivity grows with the root of their number."""
        return self.noise / math.sqrt(self.directions)


def check_budget(delta: float, rows: int | None = None, sampling: str = "poisson") -> None:
    """Refuse what no epsilon could be told of.

    Parameters
    ----------
    delta : float
        Must be below 1 / rows: at that size, publishing a random row outright would be allowed.
    rows : int or None
        Of the client; None checks it against 1 alone.
    sampling : str
        How a step's rows are drawn.

    Raises
    ------
    ConfigError
        With the bound and what to do.
    """
    if sampling != "poisson":
        raise ConfigError(
            f"sampling {sampling!r} under differential privacy: the accounting is for Poisson samples, and would tell "
            "too small an epsilon; use 'poisson'"
        )
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta}: must be over 0 and below 1; 1e-6 is usual")
    if rows is not None and delta * rows >= 1:
        raise ConfigError(
            f"delta {delta} with {rows} rows: must be below 1 / rows = {1 / rows:.3g}, or publishing one row in the "
            f"clear would count as private; lower it, for instance to {0.1 / rows:.1g}"
        )


def epsilon(
    noise: float, rate: float, steps: int, delta: float, directions: int = 1, *, rows: int | None = None,
    sampling: str = "poisson",
) -> float:  # fmt: skip
    """What a client's scalars tell of a row at most: (epsilon, delta), a row more or less.

    Parameters
    ----------
    noise : float
        sigma of `PrivateScalar`.
    rate : float
        q, chance of each row to be in a step's sample.
    steps : int
        Over all rounds that the client was in; a step whose scalar was sent and not used counts.
    delta : float
        Chance that the bound does not hold.
    directions : int
        Scalars a step, all on one sample.
    rows, sampling
        As `check_budget` takes them.

    Raises
    ------
    ConfigError
        A number out of its bounds, or samples of another kind.
    MissingExtraError
        The accounting library is not installed.

    Notes
    -----
    An upper bound by privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049), on a grid that is finer where
    a step tells little, since its rounding adds up. Above 100, where that takes gigabytes, the bound by Renyi
    divergences (Mironov et al. 2019, arXiv:1908.10530); its sums are not exact enough where a step tells very little.
    """
    check_budget(delta, rows, sampling)
    return _spent([Release(noise, rate, steps, directions)], delta)


def epsilon_of(releases: Sequence[Release], delta: float, *, rows: int | None = None) -> float:
    """As `epsilon`, for steps of several kinds one after another; 0 for none.

    Rows of different clients are different rows: what a federation tells of a row is what its own client told.
    """
    check_budget(delta, rows)
    return _spent(releases, delta)


def noise_for(
    epsilon: float, rate: float, steps: int, delta: float, directions: int = 1, *, rows: int | None = None,
    sampling: str = "poisson",
) -> float:  # fmt: skip
    """The smallest noise multiplier, to one part in a thousand, that keeps to an epsilon.

    Parameters
    ----------
    epsilon : float
        Over 0, at most 100.
    rate, steps, delta, directions, rows, sampling
        As `honeloom.federated.dp.epsilon` takes them.

    Returns
    -------
    float
        Its epsilon is at most the one asked for.

    Raises
    ------
    ConfigError
        Another epsilon, or none of the noise multipliers up to 1e7 keeps to it.
    """
    check_budget(delta, rows, sampling)
    if not 0 < epsilon <= HOPELESS:
        raise ConfigError(f"epsilon {epsilon}: must be over 0 and at most {HOPELESS:g}; 1 to 10 are usual")

    def excess(log_noise: float, bound: Any = _spent) -> float:
        noise = math.exp(log_noise) * math.sqrt(directions)
        spent = bound([Release(noise, rate, steps, directions)], delta)
        return math.log(max(spent, 1e-12) / epsilon)

    least, most = math.log(LEAST) + 1e-9, math.log(MOST)
    low, high = least, most
    while high - low > 0.05:  # near where the quick bound is kept to
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle, _renyi) <= 0 else (middle, high)
    while excess(high) > 0:
        if high >= most:
            raise ConfigError(
                f"epsilon {epsilon:g} with {steps} steps at rate {rate:g}: no noise multiplier up to {MOST:g} keeps to "
                "it; ask for fewer steps or a larger epsilon"
            )
        low, high = high, min(most, high + 0.2)
    stride = 0.1
    while excess(low) <= 0:
        if low <= least:
            return math.exp(low) * math.sqrt(directions)
        stride *= 2
        low, high = max(least, low - stride), low
    return math.exp(_just_enough(excess, low, high)) * math.sqrt(directions)


def _just_enough(excess: Any, low: float, high: float) -> float:
    """A root, from the side where there is no excess."""
    found = float(brentq(excess, low, high, xtol=4e-4, rtol=1e-12))
    while excess(found) > 0:
        found += 2e-4
    return found


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} {value} of a private scalar: must be finite and over 0")


def _spent(releases: Sequence[Release], delta: float) -> float:
    if not releases:
        return 0.0
    quick = _renyi(releases, delta)
    if quick > HOPELESS:
        return quick
    return _accounted(
        _library().pld.PLDAccountant(value_discretization_interval=_grid(releases, quick)), releases, delta
    )


def _grid(releases: Sequence[Release], quick: float) -> float:
    """Half of what a step tells, about, but no more than 100,000 points over a step's losses, or over epsilon."""
    told = min(part.rate / part.multiplier for part in releases)
    least = min(part.multiplier for part in releases)
    widest = max(quick, 0.5 / least**2 + 8 / least)
    return min(COARSEST, max(FINEST, told / 2, 1e-5 * widest))


def _renyi(releases: Sequence[Release], delta: float) -> float:
    """Quick, and a guide where it is not exact: what the library says to that is of no use to anybody."""
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True
    try:
        return _accounted(_library().rdp.RdpAccountant(ORDERS), releases, delta)
    finally:
        log.disabled = before


def _accounted(accountant: Any, releases: Sequence[Release], delta: float) -> float:
    library = _library()
    for part in releases:
        event = library.GaussianDpEvent(part.multiplier)
        if part.rate < 1:  # all rows every time is the plain mechanism, whose composition is exact
            event = library.PoissonSampledDpEvent(part.rate, event)
        accountant.compose(event, part.steps)
    return float(accountant.get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as absent:
        raise MissingExtraError(
            f"accounting for differential privacy needs dp-accounting ({absent}): pip install 'honeloom[dp]'"
        ) from absent
    return dp_accounting
