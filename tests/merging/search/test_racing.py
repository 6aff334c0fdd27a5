"""Estimates, paired comparisons, and how many rows a race takes."""

from __future__ import annotations

import numpy as np
import pytest
from search_ports import FormulaPort

from honeloom.errors import ConfigError
from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.cma import cma_es
from honeloom.merging.search.objective import Difference, Objective
from honeloom.merging.search.racing import Race, race_order, rung_sizes

ALL = np.arange(4)


def test_the_objective_is_the_mean_of_domains_ratios():
    objective = Objective(["a", "a", "b", "b"])
    values = np.array([[2.0, 1], [4, 2], [9, 3], [1, 2]])
    assert objective.estimate(values, ALL).value == pytest.approx((6 / 3 + 10 / 5) / 2)
    weighted = Objective(["a", "a", "b", "b"], {"a": 3, "b": 1})
    assert weighted.estimate(values, ALL).value == pytest.approx(2.0)
    skewed = np.array([[2.0, 1], [4, 2], [9, 3], [6, 2]])
    assert weighted.estimate(skewed, ALL).value == pytest.approx(0.75 * 2 + 0.25 * 3)
    # Only rows of a: b does not count.
    assert weighted.estimate(skewed[:2], ALL[:2]).value == pytest.approx(2.0)


def test_the_standard_error_of_unit_weights_is_that_of_a_mean():
    values = np.array([1.0, 2, 4, 7, 3, 5])
    found = Objective(["a"] * 6).estimate(np.stack([values, np.ones(6)], axis=1), np.arange(6))
    assert found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(6))


def test_a_paired_difference_does_not_see_what_both_share():
    dice = np.random.default_rng(0)
    hard, gain = 10 * dice.standard_normal(50), 0.1 + 0.05 * dice.standard_normal(50)
    one = np.stack([hard - gain, np.ones(50)], axis=1)
    other = np.stack([hard, np.ones(50)], axis=1)
    found = Objective(["a"] * 50).difference(one, other, np.arange(50))
    assert found.value == pytest.approx(-gain.mean())
    assert found.stderr == pytest.approx(gain.std(ddof=1) / np.sqrt(50))
    assert found.freedom == 49
    assert found.is_below(0, 0.99) and not found.is_above(0, 0.5)


def test_two_domains_add_their_variances():
    dice = np.random.default_rng(1)
    gaps = dice.standard_normal(20)
    codes = ["a"] * 8 + ["b"] * 12
    one = np.stack([gaps, np.ones(20)], axis=1)
    found = Objective(codes).difference(one, np.stack([np.zeros(20), np.ones(20)], axis=1), np.arange(20))
    errors = [gaps[:8].std(ddof=1) / np.sqrt(8), gaps[8:].std(ddof=1) / np.sqrt(12)]
    assert found.stderr == pytest.approx(np.hypot(*errors) / 2)


def test_a_domain_with_one_row_takes_the_variance_of_the_others():
    values = np.array([[1.0, 1], [3, 1], [5, 1]])
    found = Objective(["a", "a", "b"]).estimate(values, np.arange(3))
    # One row of a has variance 2: (2 / 2 + 2 / 1) / 4.
    assert found.stderr == pytest.approx(np.sqrt(3 / 4))
    alone = Objective(["a", "b"]).difference(values[:2], values[1:], np.arange(2))
    assert alone.stderr == np.inf
    assert not alone.is_below(0, 0.95) and not alone.is_above(0, 0.95)


def test_the_test_is_students():
    # t(.95, 4) = 2.1318
    assert Difference(-2.14, 1.0, 4).is_below(0, 0.95)
    assert not Difference(-2.13, 1.0, 4).is_below(0, 0.95)
    assert Difference(-2.13, 1.0, 4).is_below(0, 0.5)
    assert not Difference(0.0, 0.0, 4).is_below(0, 0.95)


def test_factors_are_the_derivative_of_the_estimate():
    objective = Objective(["a", "b", "a", "b"], {"a": 2, "b": 1})
    values = np.array([[2.0, 1], [4, 2], [9, 3], [1, 2]])
    factors = objective.factors(values[:, 1], ALL)
    assert float(factors @ values[:, 0]) == pytest.approx(objective.estimate(values, ALL).value)


def test_wrong_weights_of_domains_are_refused():
    with pytest.raises(ConfigError, match="'mth': no row has it; did you mean 'math'"):
        Objective(["math", "code"], {"mth": 1})
    with pytest.raises(ConfigError, match="at least 0 and one above 0"):
        Objective(["math", "code"], {"math": 0})


def test_every_beginning_of_the_order_is_stratified():
    domains = ["a"] * 64 + ["b"] * 32 + ["c"] * 16
    order = race_order(Objective(domains), seed=5)
    assert sorted(order.tolist()) == list(range(112))
    for size in (14, 28, 56):
        begun = [domains[i] for i in order[:size]]
        for domain in "abc":
            assert abs(begun.count(domain) - size * domains.count(domain) / 112) <= 1
    assert race_order(Objective(domains), seed=6).tolist() != order.tolist()


def test_rungs():
    assert rung_sizes(800, 2) == [100, 200, 400, 800]
    assert rung_sizes(20, 2) == [8, 10, 20]
    assert rung_sizes(5, 3) == [5]


def test_a_worse_candidate_is_stopped_after_the_first_rung_and_a_better_one_is_measured_whole():
    port = FormulaPort(lambda w: float(w[0][1]), 2, rows=80, difficulty=5, spread=0.05)
    race = Race(port.data(), confidence=0.95, margin=0.0, racing=True)
    measured, accepted = race.challenge(Candidate.of([[0.5, 0.5]]))
    assert (len(measured.values), accepted) == (10, False)
    assert race.rows_evaluated == port.rows_measured == 10
    measured, accepted = race.challenge(Candidate.of([[1.0, -0.5]]))
    assert (len(measured.values), accepted) == (80, True)
    whole = Race(port.data(), confidence=0.95, margin=0.0, racing=False)
    assert len(whole.measure(Candidate.of([[0.5, 0.5]])).values) == 80


def test_a_candidate_that_all_rows_could_not_show_to_be_better_is_stopped():
    # The error of .03 after 100 of 400 rows will halve: a gap of .02 may still become an improvement, .06 may not.
    for gap, stopped in ((0.02, 400), (0.06, 100)):
        noise = np.tile([1.0, -1.0], 200)
        port = FormulaPort(lambda w: 0.0, 2, rows=400)
        port.measure = lambda c, rows, gap=gap, noise=noise: np.stack(
            [gap + 0.3 * noise[: len(rows)], np.ones(len(rows))], axis=1
        )
        race = Race(port.data(), confidence=0.95, margin=0.0, racing=True)
        race.rungs = [100, 400]
        assert len(race.measure(Candidate.of([[0.5, 0.5]])).values) == stopped


def test_an_improvement_within_noise_or_margin_is_not_accepted():
    port = FormulaPort(lambda w: 0.01 * float(w[0][1]), 2, rows=40, spread=1.0)
    race = Race(port.data(), confidence=0.95, margin=0.0, racing=True)
    best = race.incumbent.candidate.array[0]
    assert not race.challenge(Candidate.of([best * 0.99]))[1]
    exact = FormulaPort(lambda w: float(w[0][1]), 2, rows=40)
    assert Race(exact.data(), confidence=0.95, margin=0.1, racing=True).challenge(Candidate.of([[1, -0.2]]))[1]
    assert not Race(exact.data(), confidence=0.95, margin=0.3, racing=True).challenge(Candidate.of([[1, -0.2]]))[1]


def test_racing_halves_the_rows_and_the_result_is_within_its_interval():
    wanted = np.array([0.55, 0.3, 0.15])

    def value(weights: np.ndarray) -> float:
        return float(((weights[0] - wanted) ** 2).sum())

    shares, errors = [], []
    for seed in range(4):
        rows = {}
        for racing in (True, False):
            port = FormulaPort(value, 3, rows=400, difficulty=1.0, spread=0.15, seed=seed)
            found = cma_es(port.data(seed=seed), budget=150, patience=100, racing=racing)
            rows[racing] = found.rows_evaluated / found.evaluations
            assert found.rows_evaluated == port.rows_measured
            truth = value(found.candidate.array)
            if racing:
                # What the rows say of the difference to the best single model, against what is true of it.
                race = Race(port.data(seed=seed), confidence=0.95, margin=0.0, racing=False)
                gap = race.compare(race.measure(found.candidate), race.single)
                single = min(value(np.eye(3)[[k]]) for k in range(3))
                errors.append(abs(gap.value - (truth - single)) / gap.stderr)
        shares.append(rows[True] / rows[False])
    assert max(shares) <= 0.5, shares
    assert np.median(errors) < 2 and max(errors) < 3, errors
