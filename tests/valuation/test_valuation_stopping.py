"""Stopping rules on snapshots made by hand, and at work."""

import math

import numpy as np
import pytest

from honeloom.errors import ConfigError
from honeloom.testing import games
from honeloom.valuation import Budget, RankStability, StandardError, TopStability, estimate
from honeloom.valuation.stopping import Snapshot, expected_overlap, spearman

VALUE = np.array([3.0, 2.0, 1.0, 0.0])


def snapshot(evaluations=10, value=VALUE, stderr=0.1, earlier=()):
    return Snapshot(evaluations, np.array(value), np.full(len(value), stderr), tuple(map(np.array, earlier)))


def test_rules_look_at_their_own_part():
    assert Budget(10)(snapshot(10)) and not Budget(11)(snapshot(10))
    assert StandardError(0.1)(snapshot()) and not StandardError(0.09)(snapshot())
    half = Snapshot(1, VALUE, np.array([0.1, 0.1, math.inf, math.inf]))
    assert StandardError(0.1, share=0.5)(half) and not StandardError(0.1, share=0.51)(half)
    assert RankStability(checks=2)(snapshot(earlier=[VALUE[::-1], 2 * VALUE, VALUE + 1]))
    assert not RankStability(checks=2)(snapshot(earlier=[VALUE, VALUE[::-1], VALUE]))
    assert not RankStability(checks=2)(snapshot(earlier=[VALUE]))
    flat = np.ones(4)
    assert not RankStability(checks=1)(snapshot(value=flat, earlier=[flat]))


def test_rules_combine():
    yes, no = Budget(1), Budget(99)
    at = snapshot(10)
    assert (yes | no)(at) and (no | yes)(at) and not (no | no)(at)
    assert (yes & yes)(at) and not (yes & no)(at)
    assert ((no | yes) & (yes | no))(at)
    assert yes | no == Budget(1) | Budget(99)  # frozen: equal by content


def test_top_membership_by_hand():
    assert TopStability(2)(snapshot(stderr=0.0)) and TopStability(2)(snapshot(stderr=0.1))
    assert not TopStability(2)(snapshot(stderr=2.0))
    assert not TopStability(2)(snapshot(stderr=math.inf))
    assert TopStability(4)(snapshot(stderr=math.inf))  # everyone is kept
    with pytest.raises(ConfigError, match="size 5: must lie between 1 and the 4 players"):
        TopStability(5)(snapshot())


def test_expected_overlap_is_what_redraws_keep():
    draws = np.random.default_rng(0)
    value, stderr = draws.normal(size=200), np.exp(draws.normal(size=200)) * 0.3
    top = set(np.argsort(-value)[:20])
    redrawn = value + stderr * draws.normal(size=(2000, 200))
    kept = np.mean([len(top & set(np.argsort(-row)[:20])) / 20 for row in redrawn])
    assert expected_overlap(value, stderr, 20) == pytest.approx(kept, abs=0.02)


def test_rank_correlation_uses_mean_ranks_for_ties():
    assert spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.948683298)
    assert spearman(np.ones(3), np.arange(3.0)) == 0.0


@pytest.mark.parametrize("method", ["permutation", "banzhaf", "regression", "leave_one_out", "truncated"])
def test_a_rule_ends_a_run_early_with_the_values_of_that_budget(method):
    game = games.Noisy(games.benchmark_game("additive", 30, 0), 0.001, 0)
    calls = []

    class Counted:
        def __call__(self, coalition):
            return self.evaluate(coalition, 0)

        def evaluate(self, coalition, repeat):
            calls.append(coalition)
            return game.evaluate(coalition, repeat)

    stopped = estimate(Counted(), 30, method=method, budget=4000, stop=Budget(200))
    spent = len(calls)
    assert 200 <= spent < 400
    assert estimate(game, 30, method=method, budget=4000, stop=Budget(200)) == stopped


def test_top_stability_stops_once_the_best_are_clear():
    weights = np.concatenate([np.full(10, 1.0), np.zeros(30)])
    game = games.Noisy(games.additive(weights), 0.2, 0)
    calls = []

    def counted(coalition):
        calls.append(coalition)
        return game(coalition)

    scores = estimate(counted, 40, method="regression", budget=4000, stop=TopStability(10) & Budget(100))
    assert len(calls) < 1000
    assert set(np.argsort(-np.array(scores.value))[:10]) == set(range(10))
