"""Estimators where the right answer follows from mathematics."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.registry import family
from honeloom.testing import check_estimator, games
from honeloom.valuation import KnnUtility, estimate
from honeloom.valuation.chains import chain, marginals
from honeloom.valuation.executors import Inline
from honeloom.valuation.game import Game
from honeloom.valuation.knn import knn_shapley

WEIGHTS = np.array([0.5, -0.2, 0.1, 0.9, 0.3, 0.0, -0.7, 0.25, 0.6, 0.05])
SAMPLED = ["permutation", "antithetic", "truncated", "group_permutation", "banzhaf", "regression", "kernel_shap"]


def values(utility, n, **options):
    return np.array(estimate(utility, n, **options).value)


@pytest.mark.parametrize("name", ["exact", "leave_one_out", *SAMPLED])
def test_every_estimator_conforms(name):
    method = family("valuation").load(name)
    check_estimator(method, efficient=name not in {"leave_one_out", "banzhaf", "truncated"})


def test_settings_and_a_surrogate_conform_too():
    load = family("valuation").load
    check_estimator(load("regression"), efficient=True, design="bernoulli", paired=True)
    check_estimator(load("group_permutation"), efficient=True, group_size=2)
    check_estimator(load("control_variate"), efficient=True, surrogate=[0.3, 0.3, 0.4, 0.1, 0.1])


@pytest.mark.parametrize("budget", [None, 1024])
def test_exact_gives_the_weights_of_an_additive_game(budget):
    game = games.additive(WEIGHTS, empty=0.4)
    np.testing.assert_allclose(values(game, 10, method="exact", budget=budget), WEIGHTS, atol=1e-12)


@pytest.mark.parametrize(
    ("game", "shapley"),
    [
        (games.glove(2, 1), [1 / 6, 1 / 6, 2 / 3]),
        (games.glove(1, 1), [1 / 2, 1 / 2]),
        (games.unanimity(4, [1, 3]), [0, 1 / 2, 0, 1 / 2]),
        (games.majority(7), [1 / 7] * 7),
        (games.weighted_voting(51, [50, 49, 1]), [2 / 3, 1 / 6, 1 / 6]),
        (games.airport([1, 2, 3]), [1 / 3, 5 / 6, 11 / 6]),
    ],
)
def test_exact_on_games_known_from_the_literature(game, shapley):
    np.testing.assert_allclose(values(game, len(shapley), method="exact"), shapley, atol=1e-12)
    np.testing.assert_allclose(values(game, len(shapley)), shapley, atol=1e-12)  # auto takes it


tables = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.floats(-1, 1), min_size=2**n, max_size=2**n).map(lambda table: (n, table))
)


@settings(max_examples=25, deadline=None)
@given(tables, st.floats(-2, 2), st.floats(-100, 100))
def test_axioms_of_the_shapley_value(drawn, factor, shift):
    n, table = drawn

    def game(coalition):
        return table[sum(1 << i for i in coalition)]

    def other(coalition):
        return float(len(coalition) ** 2)

    phi = values(game, n, method="exact")
    np.testing.assert_allclose(phi.sum(), table[-1] - table[0], atol=1e-12)
    np.testing.assert_allclose(phi, games.shapley_by_enumeration(n, lambda m: game(frozenset(m))), atol=1e-12)
    combined = values(lambda s: factor * game(s) + other(s) + shift, n, method="exact")
    np.testing.assert_allclose(combined, factor * phi + values(other, n, method="exact"), atol=1e-10)
    np.testing.assert_allclose(values(lambda s: game(s - {0}), n, method="exact")[0], 0.0, atol=1e-12)


def test_one_permutation_is_exact_on_an_additive_game_and_least_squares_with_enough_rows():
    game = games.additive(WEIGHTS, empty=0.4)
    np.testing.assert_allclose(values(game, 10, method="permutation", budget=4 + 9), WEIGHTS, atol=1e-12)
    np.testing.assert_allclose(values(game, 10, method="kernel_shap", budget=4 + 22), WEIGHTS, atol=1e-12)
    np.testing.assert_allclose(values(game, 10, method="regression", budget=4 + 24), WEIGHTS, atol=1e-12)


def test_one_antithetic_pair_is_exact_on_a_quadratic_game_and_two_permutations_are_not():
    draws = np.random.default_rng(0)
    q = np.triu(draws.normal(size=(12, 12)), 1)
    game = games.pairwise(draws.normal(size=12), q + q.T, empty=0.3)
    budget = 4 + 2 * 11
    np.testing.assert_allclose(values(game, 12, method="antithetic", budget=budget), game.shapley, atol=1e-12)
    plain = values(game, 12, method="permutation", budget=budget)
    assert np.abs(plain - game.shapley).max() > 0.1


@pytest.mark.parametrize(("n", "size"), [(6, 2), (6, 3), (5, 2), (5, 4), (6, 1), (6, 6)])
def test_groups_shrink_to_the_mean_by_a_known_factor(n, size):
    """The mean over all orders; with K groups, equal or not, the factor is (K - 1) / (n - 1)."""
    weights = WEIGHTS[:n]
    game = Game(games.additive(weights), n, budget=1, seed=0, executor=Inline())
    game.empty, game.full = 0.0, float(weights.sum())
    bounds = (n - np.arange(size, n, size))[::-1]
    found = []
    for order in map(np.array, permutations(range(n))):
        v = chain(order, bounds) @ weights
        found.append(marginals(v, bounds, order, game))
        assert found[-1].sum() == pytest.approx(weights.sum(), abs=1e-12)
    factor = len(bounds) / (n - 1)
    np.testing.assert_allclose(np.mean(found, axis=0), weights.mean() + factor * (weights - weights.mean()), atol=1e-12)


def test_the_correlation_law_of_group_permutations():
    """Pearson sqrt(T / (T + g - 1)) = 0.503 for T = 20, g = 60; the debiased slope is 1 with sd 0.032 a seed."""
    n, size, rounds = 3000, 60, 20
    method = {"type": "group_permutation", "group_size": size}
    correlations, slopes = [], []
    for seed in range(4):
        weights = np.random.default_rng(seed).normal(size=n)
        found = values(games.additive(weights), n, method=method, budget=4 + rounds * (n // size - 1), seed=seed)
        correlations.append(np.corrcoef(found, weights)[0, 1])
        slopes.append(np.cov(found, weights)[0, 1] / weights.var())
    assert np.mean(correlations) == pytest.approx(np.sqrt(rounds / (rounds + size - 1)), abs=0.03)
    assert np.mean(slopes) == pytest.approx(1.0, abs=0.05)


def test_without_debias_the_ranks_stay_and_the_values_shrink():
    game = games.additive(WEIGHTS)
    raw, free = (
        values(game, 10, budget=100, method={"type": "group_permutation", "group_size": 5, "debias": d})
        for d in (False, True)
    )
    np.testing.assert_allclose(raw - raw.mean(), (free - free.mean()) / 9, atol=1e-12)
    assert free.sum() == pytest.approx(WEIGHTS.sum(), abs=1e-12)


@pytest.mark.parametrize("name", [*SAMPLED, "exact", "leave_one_out"])
def test_a_constant_added_to_the_utility_changes_nothing(name):
    low, high = (values(games.additive(WEIGHTS, empty=e), 10, method=name, budget=1030) for e in (0.0, 30.0))
    np.testing.assert_allclose(high, low, atol=1e-10)


def test_truncation_with_tolerance_zero_is_none_and_otherwise_saves():
    calls = []

    def saturated(coalition):
        calls.append(coalition)
        return 1 - 0.5 ** len(coalition)

    plain = estimate(saturated, 40, method="permutation", budget=400)
    assert estimate(saturated, 40, method={"type": "truncated", "tolerance": 0}, budget=400).value == plain.value
    calls.clear()
    cut = estimate(saturated, 40, method="truncated", budget=400)
    assert min(cut.count) > min(plain.count)  # the same money sees more permutations
    # 12 of 40 places bring 0.9998 of the gain, so a player's value is the mean over places, less at most 1% of it.
    np.testing.assert_allclose(np.sum(cut.value), 1.0, atol=0.01 + 1e-9)


def test_saturating_games_of_equal_players_give_equal_values():
    found = estimate(lambda s: 1 - 0.8 ** len(s), 8, method="permutation", budget=400)
    # The spread between permutations is the whole error: equal values within five of it.
    assert np.ptp(found.value) <= 5 * np.hypot(max(found.stderr), max(found.stderr))
    np.testing.assert_allclose(values(lambda s: 1 - 0.8 ** len(s), 8), (1 - 0.8**8) / 8, atol=1e-12)


def test_sample_reuse_estimates_banzhaf_values_with_the_error_it_states():
    game = games.glove(2, 2)
    found = [estimate(game, 4, method="banzhaf", budget=1000, seed=s) for s in range(30)]
    error = np.array([f.value for f in found]) - game.banzhaf
    coalitions = [frozenset(np.flatnonzero([i >> k & 1 for k in range(4)])) for i in range(16)]
    spread = np.std([game(c) for c in coalitions])
    assert np.abs(error.mean(0)).max() < 4 * 2 * spread / np.sqrt(30 * 1000)
    # A player's own effect is no part of its error, which is therefore below the bound 2 sd(v) / sqrt(m).
    assert 0.7 * 2 * spread / np.sqrt(1000) < np.mean([f.stderr for f in found]) < 1.01 * 2 * spread / np.sqrt(1000)
    assert 0.75 < np.sqrt(np.mean((error / [f.stderr for f in found]) ** 2)) < 1.3


@pytest.mark.parametrize("k", [1, 3, 6, 8])
def test_knn_is_the_definition_for_every_k(k):
    draws = np.random.default_rng(k)
    distance = draws.integers(0, 3, size=(4, 6)).astype(float)  # ties on purpose
    utility = KnnUtility(distance, draws.random((4, 6)) < 0.5, k)
    by_definition = games.shapley_by_enumeration(6, lambda m: utility(frozenset(m)))
    np.testing.assert_allclose(knn_shapley(utility), by_definition, atol=1e-12)
    scores = estimate(utility, 6)
    assert scores.method == "knn"
    np.testing.assert_allclose(np.sum(scores.value), utility(frozenset(range(6))), atol=1e-12)


def test_knn_with_soft_labels_is_the_definition():
    draws = np.random.default_rng(0)
    utility = KnnUtility(draws.random((3, 5)), draws.random((3, 5)), 2)
    by_definition = games.shapley_by_enumeration(5, lambda m: utility(frozenset(m)))
    np.testing.assert_allclose(knn_shapley(utility), by_definition, atol=1e-12)


def test_a_surrogate_ranks_more_players_than_there_are_evaluations():
    draws = np.random.default_rng(0)
    weights = draws.normal(size=400)
    surrogate = 5 + 3 * (0.7 * weights + np.sqrt(0.51) * draws.normal(size=400))
    game = games.additive(weights)
    found = estimate(game, 400, surrogate=surrogate.tolist(), budget=134)
    assert found.method == "control_variate"
    # R^2 is 0.49 by the surrogate, and a third of the rest by 130 evaluations of 400 unknowns.
    assert np.corrcoef(found.value, weights)[0, 1] == pytest.approx(np.sqrt(0.49 + 0.51 * 130 / 400), abs=0.05)
    alone = estimate(game, 400, method="regression", budget=134)
    assert np.corrcoef(alone.value, weights)[0, 1] < 0.65
    useless = estimate(game, 400, surrogate=draws.normal(size=400).tolist(), budget=900)
    np.testing.assert_allclose(useless.value, weights, atol=1e-6)
