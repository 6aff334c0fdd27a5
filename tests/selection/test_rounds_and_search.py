"""DaaR beyond one round at one depth, and bands that are searched for."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

import honeloom
from honeloom.config.base import validate
from honeloom.errors import ConfigError, RowsError
from honeloom.selection.band import band
from honeloom.selection.config import SelectConfig, TfidfEmbedding, UtilityConfig
from honeloom.selection.daar import daar, drawn_keys
from honeloom.selection.daar_config import RoundTuning
from honeloom.selection.probe import cross_fit
from honeloom.selection.vectors import unit_blocks
from honeloom.testing.fakes import FakeRows, FakeUtility, chat_row
from honeloom.types.ports import SelectionData

KINDS = 3
CLEAR = TfidfEmbedding()


def table(count=240, name="r"):
    return [chat_row(f"{name}-{i % KINDS}-{i:04}", f"{name} question number {i}", "a") for i in range(count)]


def vectors_of(ids, noise):
    found = []
    for name in ids:
        own = np.random.default_rng(int.from_bytes(name.encode()[-8:], "little")).normal(size=6) * noise
        found.append(np.eye(6)[int(name.split("-")[1])] + own)
    return next(unit_blocks(np.array(found, dtype=np.float32), standardise=False))


def open_data(rows, **ports):
    """Depth is noise: the deeper, the clearer the kinds."""
    said, warned = [], []

    def embed(table, how):
        return vectors_of(table.ids, 0.5 - 0.4 * getattr(how, "depth", 1.0))

    ports = {"embed": embed, **ports}
    data = SelectionData(FakeRows(rows), lambda: None, 0, say=said.append, warn=warned.append, **ports)
    return data, said, warned


# depths


@pytest.mark.slow
def test_a_sweep_takes_the_depth_at_which_the_probe_errs_least():
    data, said, _ = open_data(table())
    scores = daar(data, clusters=KINDS, embedding=CLEAR, sweep=[0.0, 0.5, 1.0])
    assert scores.details["probe"]["depth"] == 1.0
    losses = [one["loss"] for one in scores.details["sweep"]]
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]
    assert [one["chosen"] for one in scores.details["sweep"]] == [False, False, True]
    assert any("best at 1" in text for text in said)


def test_a_sweep_over_many_rows_looks_at_some(monkeypatch):
    seen = []

    def embed(table, how):
        seen.append((len(table), getattr(how, "depth", None)))
        return vectors_of(table.ids, 0.2)

    monkeypatch.setattr("honeloom.selection.daar.LEARN_ROWS", 100)
    data, _, _ = open_data(table(), embed=embed)
    scores = daar(data, clusters=KINDS, sweep=[0.25, 1.0])
    assert seen[1:] == [(100, 0.25), (100, 1.0), (240, scores.details["probe"]["depth"])]


# rounds


def test_every_round_probes_the_model_tuned_on_the_last_choice():
    tuned = []

    def after(rows, settings):
        tuned.append(([row.id for row in rows], settings))
        return lambda table, how: vectors_of(table.ids, 0.3 / (1 + len(tuned)))

    data, _, _ = open_data(table(), tuned=after, wanted=24)
    first = daar(data, clusters=KINDS)
    settings = RoundTuning(lr=1e-3)
    scores = daar(data, clusters=KINDS, choice="top", rounds=3, tuning=settings)
    ids = [row.id for row in data.rows]
    best = sorted(range(len(ids)), key=lambda i: (-first.value[i], ids[i]))[:24]
    assert tuned[0] == ([ids[i] for i in sorted(best)], settings)
    assert len(tuned) == 2 and all(len(rows) == 24 for rows, _ in tuned)
    told = scores.details["rounds"]
    assert [one["round"] for one in told] == [1, 2, 3]
    assert told[0]["kept"] is None and all(0 <= one["kept"] <= 1 for one in told[1:])
    assert scores.value != first.value
    assert scores.columns["pseudo_domain"] == first.columns["pseudo_domain"]


def test_rounds_need_a_number_of_rows():
    data, _, _ = open_data(table(), wanted=None)
    with pytest.raises(ConfigError, match="--keep in rows or as a share"):
        daar(data, clusters=KINDS, rounds=2)


def test_rounds_through_the_door(tmp_path):
    made = {}
    for rounds in (1, 2):
        report = honeloom.select(
            "lab:pool", method={"type": "daar", "clusters": 8, "tuning": {"lr": 5e-3}} if rounds == 2
            else {"type": "daar", "clusters": 8}, rounds=rounds, model="lab:base", keep="20%", limit=160,
            batch_size=64, output_dir=tmp_path / str(rounds),
        )  # fmt: skip
        made[rounds] = pq.read_table(tmp_path / str(rounds) / "scores.parquet")
        assert len(report.details["rounds"]) == rounds
    assert made[1]["pseudo_domain"] == made[2]["pseudo_domain"]
    assert made[1]["entropy"] != made[2]["entropy"]
    assert not (tmp_path / "2" / ".vectors").exists()


# rows for the probe alone


@pytest.fixture
def probe_file(tmp_path):
    rows = [{"id": r.id, "instruction": r.prompt, "output": r.response} for r in table(150, "p")]
    rows += [{"id": "again", "instruction": "r question number 7", "output": "a"}]
    path = tmp_path / "probe.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_probe_rows_teach_and_every_row_is_scored(probe_file):
    data, _, warned = open_data(table())
    scores = daar(data, clusters=KINDS, probe_rows=str(probe_file), embedding=CLEAR, depth=1.0)
    assert scores.details["probe"]["probe_rows"] == 150 and scores.details["probe"]["folds"] is None
    assert warned == ["daar: 1 of 151 probe rows are also to be chosen from; left out"]
    assert len(scores.value) == 240 and min(scores.value) >= 0
    assert scores.details["probe"]["accuracy"] > 0.9
    kinds = {(row.id.split("-")[1], c) for row, c in zip(data.rows, scores.columns["cluster"], strict=True)}
    assert len(kinds) == KINDS
    # what one row is worth does not hang on the other rows to choose from
    fewer, _, _ = open_data(table()[:60])
    assert daar(fewer, clusters=KINDS, probe_rows=str(probe_file), embedding=CLEAR, depth=1.0).value == pytest.approx(
        scores.value[:60]
    )


def test_too_few_probe_rows_are_refused(tmp_path):
    path = tmp_path / "probe.jsonl"
    path.write_text(json.dumps({"instruction": "one lonely question", "output": "a"}) + "\n")
    data, _, _ = open_data(table())
    with pytest.raises(RowsError, match="1 rows for the probe to learn from"):
        daar(data, clusters=KINDS, probe_rows=str(path))


def test_a_probe_of_other_rows_scores_only_those_it_did_not_learn_from():
    ids = [row.id for row in table(90)]
    labels = np.array([int(name.split("-")[1]) for name in ids])
    teach = np.arange(90) < 60
    fit = cross_fit(vectors_of(ids, 0.2), labels, KINDS, ids=ids, seed=0, teach=teach)
    assert np.isnan(fit.entropies[teach]).all() and np.isfinite(fit.entropies[~teach]).all()
    right = fit.probabilities[~teach][np.arange(30), labels[~teach]]
    assert fit.loss == pytest.approx(-np.log(right).mean())
    with pytest.raises(ValueError, match="one to score"):
        cross_fit(vectors_of(ids, 0.2), labels, KINDS, ids=ids, seed=0, teach=np.ones(90, dtype=bool))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"type": "daar", "depth": 0.5, "sweep": [0.1]}, "depth and sweep each say"),
        ({"type": "daar", "tuning": {"lr": 0.1}}, "set rounds to 2 or more"),
        ({"type": "daar", "probe_rows": "x.jsonl", "folds": 5}, "leave it out"),
        ({"type": "daar", "sweep": [2.0]}, "sweep"),
        ({"type": "daar", "probe_rows": "x.jsonl", "embedding": {"type": "file", "path": "x.npy"}}, "no vectors of"),
        ({"type": "band", "utility": {"steps": 4}}, "set band: search"),
        ({"type": "band", "band": "find"}, "or search"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(settings, what):
    with pytest.raises(ConfigError, match=what):
        validate(SelectConfig, {"rows": "x", "model": "m", "method": settings}, what="test")


def test_a_target_or_a_budget_is_for_a_search_alone():
    given = {"rows": "x", "model": "m", "target": "t", "budget": 30}
    assert validate(SelectConfig, {**given, "method": {"type": "band", "band": "search"}}, what="test").method.searches
    with pytest.raises(ConfigError, match="uses no target"):
        validate(SelectConfig, {**given, "method": {"type": "band"}}, what="test")


# search


def search(rows, worth, target=None, **settings):
    opened = []

    def utility(players, dev, how):
        opened.append((players, dev, how))
        return FakeUtility(players, worth)

    budget = settings.pop("budget", None)
    data, _, warned = open_data(
        rows, open_utility=utility, target=target and FakeRows(target), budget=budget, wanted=settings.pop("wanted", 40)
    )
    return band(data, band="search", clusters=KINDS, **settings), opened, warned


@pytest.mark.parametrize(("axis", "name"), [("inter", "40-60"), ("intra", "0-20"), ("intra", "80-100")])
def test_a_search_finds_the_band_that_teaches(axis, name):
    rows = table()
    data, _, _ = open_data(rows)
    known = band(data, axis=axis, band=name, clusters=KINDS)
    good = {row.id for row, v in zip(rows, known.value, strict=True) if v == 0.0}
    target = [chat_row(f"t-{i}", f"wanted thing {i}", "a") for i in range(9)]
    scores, opened, warned = search(rows, lambda row: float(row.id in good), target)
    assert (scores.details["axis"], scores.details["band"]) == (axis, name)
    assert scores.value == known.value and scores.order == known.order
    curve = scores.details["band_curve"]
    assert len(curve) == 10 and [one["chosen"] for one in curve].count(True) == 1
    players, dev, how = opened[0]
    assert len(players) == 11 and all(len(p) == 40 for p in players) and len(dev) == 9
    assert how.steps == 5
    assert scores.details["evaluations"] == 33 == scores.details["budget"]
    assert all(one["evaluations"] == 3 for one in curve)
    best = max(curve, key=lambda one: one["value"])
    assert best["chosen"] and best["value"] > scores.details["band_baseline"]["value"]
    assert not warned


def test_a_search_without_a_target_holds_rows_out_and_takes_them_last():
    rows = table()
    scores, opened, warned = search(rows, lambda row: 1.0, axis="intra", utility=UtilityConfig(target_rows=12))
    held = [i for i, out in enumerate(scores.columns["held_out"]) if out]
    assert len(held) == 12 == len(opened[0][1]) and "held out" in warned[0]
    assert set(scores.order[-12:]) == set(held)
    assert all(scores.value[i] == -math.inf for i in held)
    assert not {rows[i].id for i in held} & {row.id for player in opened[0][0] for row in player}
    assert {one["axis"] for one in scores.details["band_curve"]} == {"intra"}


def test_a_search_needs_an_evaluation_of_every_band():
    with pytest.raises(ConfigError, match="budget 10: a search tunes on 10 bands and on random rows, 11 evaluations"):
        search(table(), lambda row: 1.0, table(20, "t"), budget=10)
    with pytest.raises(RowsError, match="no round of tunings on all bands succeeded"):
        search(table(), lambda row: math.nan, table(20, "t"))


def test_a_search_through_the_door(tmp_path):
    report = honeloom.select(
        "lab:pool", target="lab:dev", overlap="leave_out", model="lab:base", keep="20%", limit=300, budget=6,
        method={"type": "band", "clusters": 8, "utility": {"steps": 2, "target_rows": 16}},
        band="search", axis="inter",
        batch_size=64, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert report.details["evaluations"] == 6
    assert {one["band"] for one in report.details["band_curve"]} == {f"{x}-{x + 20}" for x in range(0, 100, 20)}
    assert report.verification and all(check.passed for check in report.verification)


def test_a_band_that_failed_cannot_win_by_its_other_tunings():
    calls = []

    class Failing(FakeUtility):
        def evaluate(self, coalition, repeat):
            calls.append((tuple(coalition), repeat))
            if repeat == 1 and 3 in coalition:
                raise RuntimeError("out of memory")
            return super().evaluate(coalition, repeat) + (100.0 if repeat == 1 else 0.0)

    data, _, warned = open_data(
        table(),
        target=FakeRows(table(20, "t")),
        wanted=40,
        open_utility=lambda p, dev, how: Failing(p, lambda row: 1.0),
    )
    scores = band(data, band="search", clusters=KINDS)
    assert any("1 of 33 evaluations failed" in text and "out of memory" in text for text in warned)
    assert {one["evaluations"] for one in scores.details["band_curve"]} == {2}
    assert max(one["value"] for one in scores.details["band_curve"]) < 100


def test_rows_that_all_ask_the_same_are_not_tuned_on_what_scores_them():
    rows = [chat_row(f"r-{i % KINDS}-{i:04}", "the very same question here", "a") for i in range(60)]
    with pytest.raises(RowsError, match="give rows to score on"):
        search(rows, lambda row: 1.0)


def test_a_search_over_many_rows_compares_a_part_of_each_band(monkeypatch):
    monkeypatch.setattr("honeloom.selection.band.BAND_ROWS", 10)
    _, opened, _ = search(table(), lambda row: 1.0, table(20, "t"))
    assert all(len(player) == 10 for player in opened[0][0])


def test_domains_that_no_row_is_of_have_no_row_to_stand_for_them(probe_file):
    rows = [row for row in table() if row.id.split("-")[1] != "2"]
    data, _, warned = open_data(rows)
    scores = daar(data, clusters=KINDS, probe_rows=str(probe_file), embedding=CLEAR, depth=1.0)
    assert any("of 1 domains of the probe rows" in text for text in warned)
    assert None in scores.clusters["proxy_id"] and 0 in scores.clusters["size"]


def test_a_label_without_vectors_is_no_domain():
    rows = [chat_row(row.id, row.prompt, "a", source="empty" if i < 5 else "full") for i, row in enumerate(table(60))]

    def embed(rows, how):
        found = vectors_of(rows.ids, 0.2)
        found[:5] = 0.0
        return found

    data, _, _ = open_data(rows, embed=embed)
    scores = band(data, by="source", axis="intra")
    assert scores.clusters["name"] == ["full"] and scores.details["dropped_domains"] == ["empty"]


def test_equal_entropies_are_drawn_alike():
    ids, labels = [f"r{i:03}" for i in range(200)], np.zeros(200, dtype=np.int64)
    late = [
        np.mean([i >= 100 for i in np.argsort(-drawn_keys(np.zeros(200), labels, ids, 3.0, seed))[:50]])
        for seed in range(40)
    ]
    assert abs(np.mean(late) - 0.5) < 0.04


@pytest.mark.parametrize("more", [{"quota": {"a": "10%"}}, {"must_keep": "x.txt"}])
def test_rounds_and_what_changes_the_choice_afterwards_are_refused_together(more):
    with pytest.raises(ConfigError, match="leave quota and must_keep out"):
        validate(SelectConfig, {"rows": "x", "model": "m", "method": {"type": "daar", "rounds": 2}, **more}, what="t")
