"""SHED on a world whose values are known: clusters are told by vectors, and a row is worth what its id says."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from honeloom.errors import ConfigError, RowsError
from honeloom.selection.config import ShedConfig, UtilityConfig
from honeloom.selection.groups import by_label, nearest_of_all, representatives
from honeloom.selection.shed import player_count, shed
from honeloom.selection.shed_release import released_values
from honeloom.selection.vectors import unit_blocks
from honeloom.testing.fakes import FakeRows, chat_row
from honeloom.types.ports import SelectionData
from honeloom.valuation.executors import Inline
from honeloom.valuation.game import Game
from honeloom.valuation.noise import measure_noise

KINDS = 10


def kind(row_id):
    """Rows of the k-th kind are worth k - 4."""
    return int(row_id.split("-")[1])


class Additive:
    """v(S) = offset + what the rows of S are worth."""

    fingerprint = "additive"

    def __init__(self, players, offset=0.3, broken=False):
        self.worth = [sum(kind(row.id) - 4 for row in rows) / 100 for rows in players]
        self.offset, self.broken, self.calls = offset, broken, 0

    def __call__(self, coalition):
        return self.evaluate(coalition, 0)

    def evaluate(self, coalition, repeat):
        self.calls += 1
        return math.nan if self.broken else self.offset + sum(self.worth[i] for i in sorted(coalition))


def table(count=200):
    return [
        chat_row(f"r-{i % KINDS}-{i}", f"question {i}", f"answer {i}", source=f"s{i % KINDS}") for i in range(count)
    ]


def embed(rows, how):
    """One direction per kind, with a little of the row's own."""
    vectors = np.eye(KINDS, dtype=np.float32)[[kind(i) for i in rows.ids]]
    own = np.array([[int(i.split("-")[2]) % 7] for i in rows.ids], dtype=np.float32) / 100
    return next(unit_blocks(vectors + own, standardise=False))


def known(settings):
    """No surrogate, and as many players as kinds, where these settings mean anything."""
    given = {} if settings.get("mode", "standard") != "standard" else {"surrogate": "none"}
    return {**given, **({"players": KINDS} if settings.get("by", "embedding") == "embedding" else {}), **settings}


def run(rows, *, target=True, budget=60, seed=0, **settings):
    made = []

    def open_utility(players, dev, utility):
        made.append((Additive(players), utility, dev))
        return made[-1][0]

    said, warned = [], []
    data = SelectionData(
        FakeRows(rows), lambda: None, seed, target=FakeRows([chat_row("t", "q", "a")]) if target else None,
        budget=budget, wanted=20, embed=embed, open_utility=open_utility, say=said.append, warn=warned.append,
    )  # fmt: skip
    scores = shed(data, **known(settings))
    return scores, made[0], warned


def kept(scores, rows, count):
    return [rows[i].id for i in scores.order[:count]]


def test_the_best_clusters_are_taken_whole_and_in_order():
    rows = table()
    scores, (utility, _, _), _ = run(rows, sampling="qocs")
    assert [kind(i) for i in kept(scores, rows, 60)] == [9] * 20 + [8] * 20 + [7] * 20
    assert np.allclose([v * 100 for v in scores.value], [kind(r.id) - 4 for r in rows])
    assert scores.details["evaluations"] <= 60
    assert utility.calls <= 60
    assert scores.clusters["size"] == [20] * KINDS
    assert scores.details["empty"] == pytest.approx(0.3)


def test_qwcs_prefers_the_best_and_draws_others_too():
    rows = table()
    chosen = [kind(i) for i in kept(run(rows, factor=2.0)[0], rows, 60)]
    assert np.mean(chosen) > 6
    assert len(set(chosen)) > 5
    even = [kind(i) for i in kept(run(rows, factor=0.0)[0], rows, 60)]
    assert 3 < np.mean(even) < 6


def test_the_choice_does_not_depend_on_the_order_of_the_rows():
    rows = table()
    for settings in ({"sampling": "qocs"}, {"sampling": "qwcs"}, {"by": "source"}):
        one, other = run(rows, **settings)[0], run(rows[::-1], **settings)[0]
        assert set(kept(one, rows, 30)) == set(kept(other, rows[::-1], 30))


def test_without_a_target_rows_are_held_out_and_taken_last():
    rows = table()
    scores, (_, _, dev), warned = run(rows, target=False)
    held = [rows[i].id for i, h in enumerate(scores.columns["held_out"]) if h]
    assert len(held) == 20 == len(dev)
    assert {r.id for r in dev} == set(held) == set(kept(scores, rows, 200)[-20:])
    assert "held out" in warned[0]
    proxies = {rows[i].id for i, p in enumerate(scores.columns["proxy"]) if p}
    assert not proxies & set(held)


def test_players_can_be_sources():
    rows = table()
    scores, (utility, _, _), _ = run(rows, by="source", sampling="qocs")
    assert scores.details["players"] == KINDS
    assert len(utility.worth) == KINDS
    assert {kind(i) for i in kept(scores, rows, 20)} == {9}


def test_removal_curves_fall_fastest_without_the_best():
    scores, _, _ = run(table(), curves=3, budget=80)
    removal = scores.details["removal"]
    assert removal["share"] == [0.0, 0.2, 0.5, 0.8, 1.0]
    assert removal["without_best"][1] < removal["without_best"][0] < removal["without_worst"][1]
    assert removal["without_best"][-1] == removal["without_worst"][-1] == scores.details["empty"]
    assert run(table(), curves=0)[0].details["removal"] is None


def test_a_shift_of_the_utility_changes_no_value_but_the_releases():
    """v(empty) is measured; the release takes it for zero, so that its values follow the shift."""
    players = [[row] for row in table(40)]

    def values(offset, mode):
        game = Game(Additive(players, offset), 40, budget=400, seed=0, executor=Inline())
        if mode == "release":
            measure_noise(game, most=4)
            return released_values(game, group_size=4).value
        data = SelectionData(
            FakeRows(table()), lambda: None, 0, target=FakeRows([chat_row("t", "q", "a")]), budget=80, embed=embed,
            open_utility=lambda players, *_: Additive(players, offset),
        )  # fmt: skip
        return np.array(shed(data, **known({"mode": mode})).value)

    for mode in ("standard", "shed-paper"):
        assert np.allclose(values(0.0, mode), values(5.0, mode), atol=1e-9)
    gap = values(5.0, "release") - values(0.0, "release")
    assert gap.sum() == pytest.approx(5.0 * 4 * round(gap.sum() / 20.0))  # the last group of a permutation takes it all
    assert gap.max() > 1.0


def test_the_release_loses_rows_whose_score_is_zero():
    rows = table()
    scores, _, _ = run(rows, mode="shed-release", budget=40, curves=0, sampling="qocs")
    zero = {i for i, r in enumerate(rows) if kind(r.id) == 4 and scores.value[i] == -math.inf}
    values = scores.clusters["value"]
    assert zero and 0.0 in values


def test_faithful_modes_differ_from_ours():
    rows = table()
    paper, release = (run(rows, mode=m, budget=200)[0] for m in ("shed-paper", "shed-release"))
    assert paper.details["estimator"] == "group_permutation"
    assert release.details["estimator"] == "shed-release"


def test_rows_that_are_all_alike_cannot_be_valued():
    with pytest.raises(RowsError, match="all alike"):
        run([r for r in table() if kind(r.id) == 3 and int(r.id.split("-")[2]) % 7 == 0])


def test_a_utility_that_always_fails_is_an_error_not_a_choice():
    data = SelectionData(
        FakeRows(table()), lambda: None, 0, target=FakeRows([chat_row("t", "q", "a")]), budget=60, embed=embed,
        open_utility=lambda players, *_: Additive(players, broken=True),
    )  # fmt: skip
    with pytest.raises(RowsError, match="could not be tuned"):
        shed(data, surrogate="none", players=KINDS)


def test_a_target_of_the_wrong_kind_is_named():
    with pytest.raises(RowsError, match="choice"):
        run(table(), utility=UtilityConfig(score="accuracy"))


def test_steps_follow_from_the_players():
    _, (_, utility, _), _ = run(table(), proxies=20, by="source")
    assert utility.steps == math.ceil(KINDS * 20 / utility.batch_size)
    assert run(table())[1][1].steps == 8


@pytest.mark.parametrize(
    ("rows", "asked", "budget", "count"),
    [
        (100_000, None, 30_000, 3000),
        (100_000, None, 300, 100),
        (160, None, 300, 20),
        (10, 50, 300, 10),
        (4, None, 8, 2),
    ],
)
def test_players_are_a_third_of_the_budget(rows, asked, budget, count):
    assert player_count(rows, asked, budget) == count


def test_one_row_is_too_few():
    with pytest.raises(RowsError, match="at least 2"):
        player_count(1, None, 300)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**31))
def test_representatives_are_the_nearest_members(n, each, seed):
    rng = np.random.default_rng(seed)
    labels = [f"l{k}" for k in rng.integers(0, 4, n)]
    ids = [f"r{i:03}" for i in range(n)]
    groups = by_label(labels, ids=ids, seed=0)
    groups.distance[:] = rng.integers(0, 3, n)  # ties
    allowed = rng.random(n) < 0.8
    found = representatives(groups, allowed, each, ids)
    for g, members in enumerate(found):
        all_of = [i for i in range(n) if groups.label[i] == g and allowed[i]]
        assert members == sorted(all_of, key=lambda i: (groups.distance[i], ids[i]))[:each]


def test_the_paper_lets_two_clusters_share_a_proxy():
    vectors = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    assert nearest_of_all(
        vectors, np.array([[0.1, 0.9], [0.3, 0.8], [1.0, 0.2]], dtype=np.float32), np.array([True, True])
    ) == [0, 0, 1]


def test_unit_rows_are_standardised_and_the_broken_ones_zero():
    vectors = np.array([[100.0, 1.0], [102.0, 3.0], [104.0, 2.0], [np.nan, 0.0]], dtype=np.float32)
    (found,) = unit_blocks(vectors, standardise=True)
    assert np.allclose(np.linalg.norm(found[:3], axis=1), 1)
    assert (found[3] == 0).all()
    centred = (vectors[:3] - vectors[:3].mean(0)) / vectors[:3].std(0)
    assert np.allclose(found[:3], centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-6)


def test_no_ledger_is_needed():
    data = SelectionData(
        FakeRows(table()), lambda: None, 0, target=FakeRows([chat_row("t", "q", "a")]), embed=embed,
        open_utility=lambda players, *_: Additive(players), open_evaluations=lambda f, b: nullcontext((None, None)),
    )  # fmt: skip
    assert shed(data, surrogate="none").details["budget"] == 300


def test_rows_that_ask_what_a_held_out_row_asks_play_for_nobody():
    rows = [chat_row(f"r-{i % KINDS}-{i}", f"What is the answer to number {i // 2}?", f"{i}") for i in range(200)]
    scores, (_, _, dev), warned = run(rows, target=False)
    asked = {row.prompt for row in dev}
    players = [rows[i] for i, proxy in enumerate(scores.columns["proxy"]) if proxy]
    assert len(players) == KINDS
    assert not [row for row in players if row.prompt in asked]
    assert any("ask what a held-out row asks" in w for w in warned)


@pytest.mark.parametrize("mode", ["shed-paper", "shed-release"])
def test_the_faithful_modes_hold_out_too(mode):
    scores, _, _ = run(table(), target=False, mode=mode, budget=200)
    assert not [1 for p, h in zip(scores.columns["proxy"], scores.columns["held_out"], strict=True) if p and h]


def test_values_that_are_rounding_errors_are_drawn_from_evenly():
    class Flat(Additive):
        def evaluate(self, coalition, repeat):
            return 0.45 + 1e-17 * len(coalition)

    data = SelectionData(
        FakeRows(table()), lambda: None, 0, target=FakeRows([chat_row("t", "q", "a")]), budget=60, embed=embed,
        open_utility=lambda players, *_: Flat(players),
    )  # fmt: skip
    scores = shed(data, surrogate="none", players=KINDS)
    assert scores.details["effective_clusters"] == pytest.approx(KINDS)


def test_the_release_says_what_it_needs_before_it_spends():
    with pytest.raises(ConfigError, match=r"at least \d+ evaluations"):
        run(table(), mode="shed-release", budget=12, curves=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"by": "source", "players": 4}, "players changes nothing with by: source"),
        ({"by": "domain", "embedding": "tfidf"}, "embedding changes nothing"),
        ({"sampling": "qocs", "factor": 3}, "factor changes nothing with sampling: qocs"),
        ({"mode": "shed-paper", "estimator": "regression"}, "estimator changes nothing"),
        ({"mode": "shed-release", "stability": 0.9}, "stability changes nothing"),
        ({"estimator": "regression", "surrogate": "in_run"}, "surrogate: in_run is for"),
        ({"estimator": "knn"}, "unknown valuation method 'knn'"),
        ({"estimator": {"type": "regression", "paird": True}}, "did you mean 'paired'"),
        ({"estimator": {"type": "truncated", "tolerance": 2}}, "tolerance"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        ShedConfig(**settings)
