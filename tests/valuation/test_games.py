"""The oracle itself: formulas of the games against the definition."""

import numpy as np
import pytest

from honeloom.testing import games
from honeloom.testing.games import banzhaf_by_enumeration, shapley_by_enumeration

Q = np.array([[0.0, 0.3, -0.2, 0.1], [0.3, 0.0, 0.5, 0.0], [-0.2, 0.5, 0.0, 0.4], [0.1, 0.0, 0.4, 0.0]])
CLOSED_FORMS = {
    "additive": games.additive([0.1, -0.2, 0.3], empty=0.4),
    "pairwise": games.pairwise([0.1, 0.2, 0.3, -0.4], Q, empty=1.0),
    "saturating": games.saturating([0.1, 0.2, -0.1, 0.5, 0.3], rate=2.0, height=0.7, empty=0.3),
    "unanimity": games.unanimity(5, [0, 3, 4]),
    "majority": games.majority(5),
    "airport": games.airport([3.0, 1.0, 2.0, 2.0]),
    **{f"benchmark {k}": games.benchmark_game(k, 8, seed=2) for k in ("additive", "pairwise", "saturating")},
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_formulas_are_the_definition(name):
    game = CLOSED_FORMS[name]
    np.testing.assert_allclose(game.shapley, shapley_by_enumeration(game.n_players, game.value), atol=1e-12)
    if game.banzhaf is not None:
        np.testing.assert_allclose(game.banzhaf, banzhaf_by_enumeration(game.n_players, game.value), atol=1e-12)


def test_values_known_from_the_literature():
    np.testing.assert_allclose(games.glove(2, 1).shapley, [1 / 6, 1 / 6, 2 / 3], atol=1e-15)
    np.testing.assert_allclose(games.glove(2, 1).banzhaf, [1 / 4, 1 / 4, 3 / 4], atol=1e-15)
    np.testing.assert_allclose(games.glove(1, 1).shapley, [1 / 2, 1 / 2], atol=1e-15)
    np.testing.assert_allclose(games.weighted_voting(51, [50, 49, 1]).shapley, [2 / 3, 1 / 6, 1 / 6], atol=1e-15)
    np.testing.assert_allclose(games.airport([1, 2, 3]).shapley, [1 / 3, 5 / 6, 11 / 6], atol=1e-15)


def test_benchmark_games_have_the_stated_weights():
    game = games.benchmark_game("additive", 300, seed=0)
    assert game.shapley.sum() == pytest.approx(0.15)
    assert (game.shapley < 0).sum() == 75
    assert game(frozenset()) == 0.3
    assert game(frozenset(range(300))) == pytest.approx(0.45)
    other = games.benchmark_game("pairwise", 300, seed=0)
    assert np.std(other.shapley - game.shapley) == pytest.approx(0.5 * 1e-5 * np.sqrt(299), rel=0.15)


def test_noise_follows_from_seed_coalition_and_repeat_alone():
    game = games.Noisy(games.additive([0.0] * 50), sd=2.0, seed=4)
    draws = np.array([game.evaluate(frozenset({i}), r) for i in range(50) for r in range(20)])
    assert abs(draws.mean()) < 4 * 2 / np.sqrt(1000)
    assert draws.std() == pytest.approx(2.0, rel=0.1)
    assert len(set(draws)) == 1000
    assert game.evaluate(frozenset({3, 1}), 5) == game.evaluate(frozenset({1, 3}), 5)
    assert game(frozenset({7})) == game.evaluate(frozenset({7}), 0)
    assert games.Noisy(game.game, 2.0, seed=5)(frozenset({7})) != game(frozenset({7}))
