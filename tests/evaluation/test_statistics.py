"""Estimates against closed forms."""

import math

import numpy as np
import pytest

from honeloom.evaluation.statistics import Estimate, macro_bootstrap, macro_mean, paired_bootstrap, ratio_mean


def test_mean_with_equal_weights_is_the_ordinary_standard_error():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    got = ratio_mean(values, np.ones(4))
    assert got.value == 3.0
    assert got.stderr == pytest.approx(values.std(ddof=1) / 2)
    assert got.n == 4


def test_tokens_weigh():
    got = ratio_mean(np.array([10.0, 1.0]), np.array([5.0, 1.0]))
    assert got.value == pytest.approx(11 / 6)


def test_ratio_error_matches_simulation():
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(400):
        tokens = rng.integers(5, 200, 60).astype(float)
        sums = tokens * rng.normal(2.0, 0.5, 60)
        estimate = ratio_mean(sums, tokens)
        estimates.append(estimate.value)
        errors.append(estimate.stderr)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.12)


def test_one_row_has_no_error_and_none_has_no_value():
    assert ratio_mean(np.array([4.0]), np.array([2.0])) == Estimate(2.0, None, 1)
    assert math.isnan(ratio_mean(np.array([]), np.array([])).value)


def test_macro_is_the_unweighted_mean():
    got = macro_mean([Estimate(1.0, 0.3, 10), Estimate(3.0, 0.4, 1000)])
    assert (got.value, got.stderr, got.n) == (2.0, pytest.approx(0.25), 1010)
    assert macro_mean([Estimate(1.0, None, 1), Estimate(2.0, 0.1, 5)]).stderr is None


def test_bootstrap_of_a_constant_gap_is_exact():
    weights = np.arange(1.0, 21.0)
    got = paired_bootstrap(3.0 * weights, 2.5 * weights, weights, resamples=200)
    assert (got.difference, got.low, got.high) == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5))


def test_bootstrap_interval_is_that_of_the_normal_theory_and_repeats():
    rng = np.random.default_rng(1)
    one, other = rng.normal(1.0, 1.0, 400), rng.normal(0.9, 1.0, 400)
    got = paired_bootstrap(one, other, np.ones(400), seed=7)
    expected = 1.96 * (one - other).std(ddof=1) / 20
    assert (got.high - got.low) / 2 == pytest.approx(expected, rel=0.1)
    assert got == paired_bootstrap(one, other, np.ones(400), seed=7)
    assert got != paired_bootstrap(one, other, np.ones(400), seed=8)


def test_rows_without_tokens_do_not_unmake_the_interval_of_a_small_domain():
    one = np.array([[2.0, 1.0], [0.0, 0.0], [0.0, 0.0], [4.0, 2.0], [9.0, 3.0]])
    other = np.array([[3.0, 1.0], [0.0, 0.0], [0.0, 0.0], [6.0, 2.0], [6.0, 3.0]])
    domains, shares = ["a", "a", "a", "b", "b"], {"a": 0.5, "b": 0.5}
    got = macro_bootstrap(one, other, domains, shares)
    assert got.difference == pytest.approx(0.5 * (2 - 3) + 0.5 * (13 / 5 - 12 / 5))
    assert np.isfinite([got.low, got.high]).all()
    assert got.low <= got.difference <= got.high
    assert got.n == 3


def test_draws_over_domains_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    """2,000 draws of many rows do not fit in memory at once."""
    rng = np.random.default_rng(5)
    one, other = (np.stack([rng.random(70), rng.integers(1, 9, 70)], axis=1) for _ in range(2))
    domains, shares = ["a"] * 30 + ["b"] * 40, {"a": 0.25, "b": 0.75}
    found = []
    for block in (1, 100, 1 << 40):
        monkeypatch.setattr("honeloom.evaluation.statistics.BLOCK", block)
        found.append(macro_bootstrap(one, other, domains, shares, resamples=300))
    assert found[0] == found[1] == found[2]
