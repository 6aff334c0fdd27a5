"""Standard errors that hold, noise that is told beforehand, and utilities that fail."""

import math
import warnings

import numpy as np
import pytest

from honeloom.errors import ConfigError, UnknownNameError
from honeloom.testing import games
from honeloom.valuation import KnnUtility, estimate
from honeloom.valuation.config import RegressionConfig
from honeloom.valuation.executors import Inline
from honeloom.valuation.game import Game
from honeloom.valuation.noise import measure_noise, predict_rho
from honeloom.valuation.stopping import spearman

N = 40


def noisy(seed, sd=0.3, n=N):
    """Normal values, so that the shrinking methods' prior is right."""
    weights = 0.5 + np.random.default_rng(seed).normal(size=n)
    return games.Noisy(games.additive(weights, empty=1.0), sd, seed), weights


@pytest.mark.filterwarnings("ignore:not resolvable")
@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("leave_one_out", 150),
        ("permutation", 800),
        ("antithetic", 1600),
        ({"type": "group_permutation", "group_size": 8}, 400),
        ("banzhaf", 400),
        ("regression", 30),
        ("regression", 300),
        ({"type": "regression", "paired": True}, 300),
        ("kernel_shap", 300),
    ],
)
def test_standard_errors_are_honest(method, budget):
    """Errors in units of their standard errors have mean square 1: over 20 games of 40 players within a third."""
    ratios = []
    for seed in range(20):
        utility, weights = noisy(seed)
        scores = estimate(utility, N, method=method, budget=budget, seed=seed)
        assert np.isfinite(scores.stderr).all()
        ratios.append((np.array(scores.value) - weights) / scores.stderr)
    assert 0.67 < np.sqrt(np.mean(np.square(ratios))) < 1.33


def test_a_surrogate_keeps_the_errors_honest():
    ratios = []
    for seed in range(20):
        utility, weights = noisy(seed)
        cheap = weights + np.random.default_rng(100 + seed).normal(size=N)
        scores = estimate(utility, N, surrogate=cheap.tolist(), budget=60, seed=seed)
        ratios.append((np.array(scores.value) - weights) / scores.stderr)
    assert 0.67 < np.sqrt(np.mean(np.square(ratios))) < 1.33


def test_an_exact_value_of_a_noisy_game_tells_the_noise():
    ratios = []
    for seed in range(20):
        utility, weights = noisy(seed, n=5)
        scores = estimate(utility, 5, method="exact", budget=32 + 10, seed=seed)
        ratios.append((np.array(scores.value) - weights) / scores.stderr)
    assert 0.67 < np.sqrt(np.mean(np.square(ratios))) < 1.33


@pytest.mark.parametrize("sd", [0.0, 0.01, 1.0])
def test_the_noise_is_measured_first_and_within_the_budget(sd):
    utility, _ = noisy(3, sd)
    asked = []

    class Counted:
        def evaluate(self, coalition, repeat):
            asked.append((coalition, repeat))
            return utility.evaluate(coalition, repeat)

        def __call__(self, coalition):
            raise AssertionError("a utility that can repeat is not called plainly")

    scores = estimate(Counted(), N, budget=100)
    assert len(asked) <= 100 and len(set(asked)) == len(asked)
    full, empty = frozenset(range(N)), frozenset()
    probes = 2 if sd == 0 else 5
    assert asked[: 2 * probes] == [(s, r) for r in range(probes) for s in (full, empty)]
    assert scores.noise.margin == pytest.approx(np.mean(utility.game.shapley), abs=4 * sd / N)
    if sd == 0:
        assert scores.noise.sd == 0.0
    else:
        assert 0.3 * sd < scores.noise.sd < 2 * sd


@pytest.mark.filterwarnings("ignore:not resolvable")
def test_predicted_correlations_come_true():
    """Normal values whose sd is their mean, as the prediction assumes."""
    for n, budget, sd in ((100, 400, 0.0), (100, 400, 5.0), (100, 400, 20.0), (300, 110, 0.0), (300, 110, 5.0)):
        reached = []
        for seed in range(6):
            weights = 1 + np.random.default_rng(seed).normal(size=n)
            utility = games.Noisy(games.additive(weights), sd, seed)
            scores = estimate(utility, n, budget=budget, seed=seed, method="regression")
            reached.append(np.corrcoef(scores.value, weights)[0, 1])
        told = predict_rho(n, budget - 10, noise_sd=sd, value_sd=1.0)
        assert np.mean(reached) == pytest.approx(told, abs=0.07), (n, budget, sd)


def test_the_prediction_at_its_limits():
    assert predict_rho(100, 200, noise_sd=0.0, value_sd=1.0) == 1.0
    assert predict_rho(300, 100, noise_sd=0.0, value_sd=1.0) == pytest.approx(math.sqrt(1 / 3))
    assert predict_rho(100, 0, noise_sd=0.0, value_sd=1.0) == 0.0
    assert predict_rho(100, 100, noise_sd=1.0, value_sd=0.0) == 0.0
    assert predict_rho(10, 10, noise_sd=1e6, value_sd=1.0) < 1e-3
    assert predict_rho(10, 10, noise_sd=1.0, value_sd=1e-300) < 1e-3


def test_a_question_that_cannot_be_answered_is_said_to_be_so():
    weights = 1e-3 * (1 + np.random.default_rng(0).normal(size=N))
    utility = games.Noisy(games.additive(weights), 1.0, 0)
    with pytest.warns(UserWarning, match=r"^not resolvable: 200 evaluations with noise .* rank 40 players"):
        scores = estimate(utility, N, budget=200)
    assert scores.resolvable is False
    assert scores.noise.predicted_rho < 0.5
    clear, _ = noisy(0, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = estimate(clear, N, budget=400)
    assert scores.resolvable is True


def test_the_noise_is_told_before_the_budget_is_spent():
    said, calls = [], []

    def utility(coalition):
        calls.append(coalition)
        return 0.5 * len(coalition)

    estimate(utility, N, budget=200, say=lambda line: said.append((line, len(calls))))
    line = "noise sd 0, mean margin 0.5, predicted rank correlation 1.00 for 196 more evaluations of 40 players"
    assert said == [(line, 4)]
    with pytest.warns(UserWarning, match="failed"):
        estimate(lambda s: math.nan, N, budget=20, say=lambda line: said.append((line, 0)))
    assert said[1][0] == "noise not measured; v(N) or v(empty) could not be evaluated"


def test_values_that_cancel_in_the_sum_are_resolved_all_the_same():
    weights = np.array([1.0, -1.0] * (N // 2))
    with pytest.warns(UserWarning, match="not resolvable"):
        scores = estimate(games.Noisy(games.additive(weights), 0.1, 0), N, budget=400)
    assert scores.resolvable is True  # the fit's own errors know better than the guess from the margin
    assert spearman(np.array(scores.value), weights) > 0.85


@pytest.mark.parametrize("method", ["auto", "permutation", "banzhaf", "regression", "kernel_shap", "leave_one_out"])
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 17, 45])
def test_every_budget_returns_and_is_kept(method, budget):
    calls = []

    def utility(coalition):
        calls.append(coalition)
        return float(len(coalition))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = estimate(utility, N, method=method, budget=budget)
    assert len(calls) <= budget
    assert len(scores.value) == len(scores.stderr) == len(scores.count) == N
    assert np.isfinite(scores.value).all()


def test_failures_are_left_out_and_never_taken_for_zero():
    weights = np.arange(1.0, 9.0)
    game = games.additive(weights, empty=100.0)

    def fragile(coalition):
        if len(coalition) == 4 and coalition >= {0, 1, 2}:
            raise RuntimeError("out of memory")
        return math.nan if coalition == {2} else game(coalition)

    for method in ("exact", "permutation", "regression", "kernel_shap", "leave_one_out"):
        context = warnings.catch_warnings() if method == "leave_one_out" else pytest.warns(UserWarning, match="failed")
        with context:
            scores = estimate(fragile, 8, method=method, budget=None if method == "exact" else 150)
        assert np.abs(np.array(scores.value) - weights).max() < 1e-9, method
    with pytest.warns(UserWarning, match=r"^6 of 258 evaluations failed and were left out\. The first: "):
        estimate(fragile, 8, method="exact")


def test_a_utility_that_mostly_fails_is_left_alone():
    calls = []

    def broken(coalition):
        calls.append(coalition)
        if 0 < len(coalition) < 10:
            raise OSError("no such model")
        return float(len(coalition))

    with pytest.warns(UserWarning, match=r"more than 5%, so no more were made. The first: OSError: no such model"):
        scores = estimate(broken, 10, method="regression", budget=1000)
    assert len(calls) < 150
    assert scores.value == (1.0,) * 10  # the equal share of the gain
    assert scores.stderr == (math.inf,) * 10
    with pytest.warns(UserWarning, match="10 of 10|of .* evaluations failed"):
        nothing = estimate(lambda s: math.nan, 10, budget=50)
    assert nothing.value == (0.0,) * 10


def test_without_v_of_the_empty_coalition_nothing_is_invented():
    def base_fails(coalition):
        if not coalition:
            raise RuntimeError("no base")
        return 5.0 + len(coalition)

    with pytest.warns(UserWarning, match="failed"):
        scores = estimate(base_fails, 10, method="permutation", budget=400)
    np.testing.assert_allclose(scores.value, 1.0, atol=1e-12)  # zero for the base would give 6 to every first player


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    utility, _ = noisy(0)
    first = estimate(utility, N, budget=100, seed=5)
    assert estimate(utility, N, budget=100, seed=5) == first
    assert estimate(utility, N, budget=100, seed=6).value != first.value


def test_auto_chooses_by_players_budget_and_noise():
    def chosen(n, budget, utility=None, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return estimate(utility or games.additive(np.arange(1.0, n + 1)), n, budget=budget, **options).method

    assert chosen(5, 40) == "exact"
    assert chosen(30, 1000) == "antithetic"
    assert chosen(30, 200) == chosen(30, 40) == "regression"
    assert chosen(5, 40, utility=games.Noisy(games.additive(range(5)), 0.1)) == "exact"
    assert chosen(5, 40, utility=games.Noisy(games.additive(range(5)), 20.0)) == "regression"
    assert chosen(30, 1000, utility=games.Noisy(games.additive(range(30)), 0.1)) == "regression"
    assert chosen(5, 3) == "regression"  # too little to see any noise
    assert chosen(5, 40, surrogate=[0, 1, 2, 3, 4]) == "control_variate"
    assert chosen(4, None, utility=KnnUtility([[1, 2, 3, 4]], [[1, 0, 1, 0]], 2)) == "knn"


def test_mistakes_are_named():
    game = games.additive([1.0, 2.0, 3.0])
    with pytest.raises(UnknownNameError, match="unknown valuation method 'banzaf'; did you mean 'banzhaf'"):
        estimate(game, 3, method="banzaf")
    with pytest.raises(ConfigError, match="unknown key 'pared'; did you mean 'paired'"):
        estimate(game, 3, method={"type": "regression", "pared": True})
    with pytest.raises(ConfigError, match="'auto' has no settings"):
        estimate(game, 3, method={"type": "auto", "paired": True})
    with pytest.raises(ConfigError, match="budget 0: must be 1"):
        estimate(game, 3, budget=0)
    with pytest.raises(ConfigError, match="n_players 0: must be 1"):
        estimate(game, 0)
    with pytest.raises(ConfigError, match=r"needs 2\^21 evaluations; it takes at most 20"):
        estimate(game, 21, method="exact", budget=100)
    with pytest.raises(ConfigError, match="surrogate: needs 3 finite numbers"):
        estimate(game, 3, surrogate=[1.0, math.nan, 2.0])
    with pytest.raises(ConfigError, match="'banzhaf' takes no surrogate"):
        estimate(game, 3, method="banzhaf", surrogate=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="needs cheap values of the players"):
        estimate(game, 3, method="control_variate")
    with pytest.raises(ConfigError, match="closed form only for a KnnUtility of 3 players, not for Game"):
        estimate(game, 3, method="knn")
    with pytest.raises(ConfigError, match="need the same shape"):
        KnnUtility([[1.0, 2.0]], [[1.0]], 1)
    with pytest.raises(ConfigError, match="k 0 must be 1 or more"):
        KnnUtility([[1.0]], [[1.0]], 0)


def test_one_player_has_the_whole_gain():
    for method in ("exact", "leave_one_out", "permutation", "antithetic", "truncated", "group_permutation",
                   "regression", "kernel_shap", "auto"):  # fmt: skip
        scores = estimate(lambda s: 2.0 + 3 * len(s), 1, method=method, budget=30)
        assert scores.value == pytest.approx((3.0,)), method


def test_a_settings_object_is_a_method():
    utility, _ = noisy(0)
    options = {"budget": 100, "seed": 1}
    by_object = estimate(utility, N, method=RegressionConfig(paired=True), **options)
    assert by_object == estimate(utility, N, method={"type": "regression", "paired": True}, **options)
    assert by_object != estimate(utility, N, method="regression", **options)


def test_a_value_that_never_varies_does_not_hide_the_noise_of_the_other():
    """v(empty) of a tuning is the model as it is: pooling its zero spread would halve the variance."""

    class Tuning:
        def __call__(self, coalition):
            return self.evaluate(coalition, 0)

        def evaluate(self, coalition, repeat):
            return 1.0 + (-1) ** repeat * 0.1 if coalition else 0.0

    game = Game(Tuning(), 8, budget=100, seed=0, executor=Inline())
    noise = measure_noise(game, most=10)
    assert noise.sd == pytest.approx(np.std([1.1, 0.9, 1.1, 0.9, 1.1], ddof=1))
    assert game.spent == 5 + 2
