"""Private scalars: the noise and bound of one row that are claimed, and an accountant that agrees with others."""

import builtins
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from honeloom.errors import ConfigError, MissingExtraError
from honeloom.federated.dp import (
    PrivateScalar,
    Release,
    epsilon,
    epsilon_of,
    noise_for,
    poisson_rows,
    secret_generator,
)

MU = 1e-3


def library(*events, delta=1e-6):
    accountant = pld.PLDAccountant()
    for event, steps in events:
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    return accountant.get_epsilon(delta)


def sampled(noise, rate):
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))


def gaussian(multiplier, delta):
    """Balle and Wang 2018, theorem 8: the exact epsilon of one Gaussian mechanism."""

    def excess(eps):
        a, b = 0.5 / multiplier - eps * multiplier, -0.5 / multiplier - eps * multiplier
        return norm.cdf(a) - math.exp(eps) * norm.cdf(b) - delta

    return brentq(excess, 0, 200, xtol=1e-12)


# Accounting


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.01, 10), (1.0, 0.01, 1000), (2.0, 0.02, 10_000), (0.7, 0.1, 20)]
)
def test_epsilon_is_the_librarys(noise, rate, steps):
    assert epsilon(noise, rate, steps, 1e-6) == pytest.approx(library((sampled(noise, rate), steps)), rel=1e-6)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 100), (50.0, 10_000), (500.0, 100)])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_all_rows_in_every_step_is_the_gaussian_mechanism(noise, steps, delta):
    exact = gaussian(noise / math.sqrt(steps), delta)
    assert exact - 1e-9 <= epsilon(noise, 1.0, steps, delta) <= exact * 1.001 + 1e-4


def test_directions_are_one_vector():
    assert epsilon(4.0, 0.01, 100, 1e-6, 16) == epsilon(1.0, 0.01, 100, 1e-6)
    assert epsilon(4.0, 1.0, 1, 1e-6, 4) == pytest.approx(gaussian(2.0, 1e-6), abs=2e-4)


def test_more_noise_tells_less_and_more_of_the_rest_tells_more():
    middle = epsilon(1.5, 0.01, 200, 1e-6)
    assert epsilon(1.6, 0.01, 200, 1e-6) < middle < epsilon(1.4, 0.01, 200, 1e-6)
    assert epsilon(1.5, 0.009, 200, 1e-6) < middle < epsilon(1.5, 0.011, 200, 1e-6)
    assert epsilon(1.5, 0.01, 190, 1e-6) < middle < epsilon(1.5, 0.01, 210, 1e-6)
    assert epsilon(1.5, 0.01, 200, 1e-5) < middle < epsilon(1.5, 0.01, 200, 1e-7)
    assert middle < epsilon(1.5, 0.01, 200, 1e-6, 2)


def test_a_bound_beyond_use_is_still_a_bound_and_quick():
    low, high = epsilon(0.1, 0.5, 10_000, 1e-6), epsilon(0.1, 0.6, 10_000, 1e-6)
    assert 100 < low < high and math.isfinite(high)


def test_a_million_steps_that_tell_little():
    """The grid is finer than the library's own, whose rounding adds up; Renyi's bound is between the two."""
    found = epsilon(20.0, 0.001, 1_000_000, 1e-6)
    accountant = dp_accounting.rdp.RdpAccountant()
    renyi = accountant.compose(sampled(20.0, 0.001), 1_000_000).get_epsilon(1e-6)
    # without the sampling's help, its central limit: a Gaussian mechanism of this multiplier
    limit = gaussian(1 / (0.001 * math.sqrt(1e6 * math.expm1(1 / 400))), 1e-6)
    assert limit * 0.999 < found < renyi < library((sampled(20.0, 0.001), 1_000_000))


def test_steps_of_several_kinds():
    parts = [Release(1.0, 0.01, 100), Release(2.0, 0.05, 50), Release(30.0, 1.0, 10)]
    events = ((sampled(1.0, 0.01), 100), (sampled(2.0, 0.05), 50), (dp_accounting.GaussianDpEvent(30.0), 10))
    assert epsilon_of(parts, 1e-6) == pytest.approx(library(*events), rel=1e-6)
    assert epsilon_of([Release(1.0, 0.01, 60), Release(1.0, 0.01, 40)], 1e-6) == pytest.approx(
        epsilon(1.0, 0.01, 100, 1e-6), rel=1e-3
    )
    assert epsilon_of([], 1e-6) == 0.0


def test_each_client_has_the_epsilon_of_its_own_rate():
    """Equal samples of few and of many rows: the client with few rows tells more of each."""
    batch, steps = 8, 100
    told = {n: epsilon_of([Release(1.0, batch / n, steps)], 1e-6, rows=n) for n in (400, 800, 4000)}
    assert told[400] > told[800] > told[4000]
    assert told[800] == pytest.approx(library((sampled(1.0, 0.01), steps)), rel=1e-6)


@pytest.mark.parametrize(
    ("wanted", "rate", "steps", "delta", "directions"),
    [
        (1.0, 0.01, 100, 1e-6, 1),
        (3.0, 1.0, 100, 1e-6, 1),
        pytest.param(2.0, 0.02, 50, 1e-6, 4, marks=pytest.mark.slow),
        pytest.param(8.0, 0.05, 30, 1e-5, 1, marks=pytest.mark.slow),
    ],
)
def test_noise_for_inverts_epsilon(wanted, rate, steps, delta, directions):
    noise = noise_for(wanted, rate, steps, delta, directions)
    assert epsilon(noise, rate, steps, delta, directions) <= wanted
    assert epsilon(noise * 0.998, rate, steps, delta, directions) > wanted


@pytest.mark.slow
def test_noise_for_where_hardly_any_is_needed():
    assert noise_for(1.0, 1e-6, 1, 1e-5) == pytest.approx(0.1)  # the row is drawn more rarely than delta


def test_noise_for_where_none_is_enough():
    with pytest.raises(ConfigError, match="fewer steps"):
        noise_for(1e-9, 0.5, 1000, 1e-9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rate": 0.0}, "sampling rate"),
        ({"rate": 1.1}, "sampling rate"),
        ({"rate": math.nan}, "sampling rate"),
        ({"noise": 0.0}, "noise"),
        ({"noise": -1.0}, "noise"),
        ({"noise": math.inf}, "noise"),
        ({"noise": 0.15, "directions": 4}, "raise noise to 0.2"),
        ({"steps": 0}, "steps"),
        ({"directions": 0}, "directions"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"rows": 1000, "delta": 1e-3}, "below 1 / rows = 0.001"),
        ({"sampling": "shuffle"}, "Poisson"),
    ],
)
def test_what_has_no_epsilon(change, says):
    given_ = {"noise": 1.0, "rate": 0.01, "steps": 10, "delta": 1e-6, **change}
    with pytest.raises(ConfigError, match=says):
        epsilon(**given_)


@pytest.mark.parametrize("wanted", [0.0, -1.0, 101.0, math.nan])
def test_epsilons_that_are_not_asked_for(wanted):
    with pytest.raises(ConfigError, match="epsilon"):
        noise_for(wanted, 0.01, 10, 1e-6)


def test_without_the_library(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r"honeloom\[dp\]"):
        epsilon(1.0, 0.01, 10, 1e-6)


# The mechanism


class NoNoise:
    def random(self, size):
        return np.full(size, 0.5)

    def standard_normal(self):
        return 0.0


def losses(scalars):
    """Of both sides, for wanted scalars of single rows."""
    scalars = np.asarray(scalars, dtype=float)
    return 2.0 + MU * scalars, 2.0 - MU * scalars


def test_the_clipped_sum_over_the_expected_rows():
    scalar = PrivateScalar(clip=1.0, noise=1.0, expected=4.0, mu=MU, rng=NoNoise())
    assert scalar(*losses([0.5, -0.25, 7.0, -9.0, 3.0])) == pytest.approx((0.5 - 0.25 + 1 - 1 + 1) / 4, rel=1e-9)


def test_mean_and_variance_are_those_of_the_theory():
    """Over samples and noise: mean sum g / n, variance (q (1 - q) sum g^2 + sigma^2 C^2) / (q n)^2."""
    n, q, clip, noise, draws = 40, 0.2, 1.0, 0.5, 40_000
    g = np.random.default_rng(0).uniform(-clip, clip, n)
    plus, minus = losses(g)
    rng = secret_generator(1)
    scalar = PrivateScalar(clip, noise, q * n, MU, rng)
    found = []
    for _ in range(draws):
        rows = poisson_rows(n, q, rng)
        found.append(scalar(plus[rows], minus[rows]))
    variance = (q * (1 - q) * (g**2).sum() + (noise * clip) ** 2) / (q * n) ** 2
    assert abs(np.mean(found) - g.mean()) < 4 * math.sqrt(variance / draws)
    assert abs(np.var(found) / variance - 1) < 5 * math.sqrt(2 / draws)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), max_size=20), st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 99))
def test_one_row_moves_it_by_its_share_at_most(others, row, seed):
    clip, expected = 2.0, 8.0

    def of(scalars):
        return PrivateScalar(clip, 1.0, expected, MU, secret_generator(seed))(*losses(scalars))

    apart = abs(of([*others, row]) - of(others))
    assert apart <= clip / expected * (1 + 1e-9)
    assert abs(of([*others, 1e300]) - of(others)) == pytest.approx(clip / expected, rel=1e-9)


def test_an_empty_sample_is_noise_alone():
    none = np.empty(0)
    found = [PrivateScalar(3.0, 2.0, 5.0, MU, secret_generator(s))(none, none) for s in range(4000)]
    assert np.std(found) == pytest.approx(2.0 * 3.0 / 5.0, rel=0.05)
    assert PrivateScalar(3.0, 2.0, 5.0, MU, secret_generator(7))(none, none) == found[7]


@pytest.mark.parametrize(
    "bad", [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (np.inf, np.inf), (-np.inf, 1.0), (1e308, -1e308)]
)
def test_rows_that_are_not_finite_count_as_nothing(bad):
    scalar = PrivateScalar(1.0, 1.0, 2.0, MU, NoNoise())
    plus, minus = losses([0.5])
    assert scalar([plus[0], bad[0]], [minus[0], bad[1]]) == scalar(plus, minus)


def test_shapes_and_settings_that_do_not_fit():
    scalar = PrivateScalar(1.0, 1.0, 2.0, MU, NoNoise())
    for plus, minus in (([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]]), (1.0, 1.0)):
        with pytest.raises(ValueError, match="both sides"):
            scalar(plus, minus)
    for bad in ({"clip": 0.0}, {"noise": 0.0}, {"expected": 0.0}, {"mu": math.inf}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            PrivateScalar(**{"clip": 1.0, "noise": 1.0, "expected": 1.0, "mu": MU, "rng": NoNoise(), **bad})


# Randomness


def test_samples_have_each_row_by_itself():
    rng = secret_generator()
    sizes = [len(poisson_rows(1000, 0.1, rng)) for _ in range(400)]
    assert abs(np.mean(sizes) - 100) < 5 * math.sqrt(90 / 400)
    assert 0.6 < np.var(sizes) / 90 < 1.5
    rows = poisson_rows(1000, 0.1, rng)
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < 1000
    assert list(poisson_rows(5, 1.0, rng)) == [0, 1, 2, 3, 4] and poisson_rows(0, 0.5, rng).shape == (0,)
    with pytest.raises(ConfigError, match="sampling rate"):
        poisson_rows(5, 0.0, rng)


def test_numbers_of_the_system_are_normal_uniform_and_never_repeat():
    rng, other = secret_generator(), secret_generator()
    normal = np.array([rng.standard_normal() for _ in range(20_000)])
    uniform = rng.random(20_000)
    assert abs(normal.mean()) < 5 / math.sqrt(20_000) and abs(normal.var() - 1) < 5 * math.sqrt(2 / 20_000)
    assert abs(np.mean(np.abs(normal) > 1.96) - 0.05) < 5 * math.sqrt(0.05 * 0.95 / 20_000)
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 5 / math.sqrt(12 * 20_000)
    assert len({*normal, *(other.standard_normal() for _ in range(1000))}) == 21_000


def test_a_seed_repeats_and_none_does_not():
    assert secret_generator(3).standard_normal() == secret_generator(3).standard_normal()
    assert secret_generator().standard_normal() != secret_generator().standard_normal()
