"""Panels of a selection by values of clusters: what they show, and that they are absent where their data is."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_texts import HOSTILE
from valued_folder import KEPT, VALUES, clusters_table, row_id, scores_table, valued_report, write_valued

from honeloom.reporting.page import write_page
from honeloom.reporting.panels import row_map
from honeloom.reporting.panels.cluster_values import cluster_values_panel
from honeloom.reporting.panels.pool_rows import pool_rows_panel
from honeloom.reporting.panels.removal import removal_panel
from honeloom.reporting.panels.row_map import row_map_panel
from honeloom.reporting.panels.scores import divergence, kept_panel
from honeloom.reporting.panels.trust import trust_panel
from honeloom.reporting.row_texts import find_rows
from honeloom.reporting.verdict import describe

PANELS = [cluster_values_panel, pool_rows_panel, removal_panel, row_map_panel, trust_panel]


@pytest.fixture
def folder(tmp_path):
    write_valued(tmp_path)
    return tmp_path


def rewrite(folder, without):
    """The scores without some columns."""
    pq.write_table(scores_table().drop_columns(list(without)), folder / "scores.parquet")


def drawn(panel, name):
    """The trace that has the points of a legend's entry."""
    return next(t for t in panel.figure["data"] if t.get("legendgroup") == name and "text" in t)


def test_every_panel_is_absent_for_a_method_without_values(folder):
    pq.write_table(clusters_table().slice(0, 0), folder / "clusters.parquet")
    rewrite(folder, ["x", "y", "distance"])
    details = {"players": None, "noise": None, "removal": None}
    assert [make(folder, valued_report(folder, **details)) for make in PANELS] == [None] * len(PANELS)
    (folder / "clusters.parquet").unlink()
    assert cluster_values_panel(folder, valued_report(folder)) is None
    assert pool_rows_panel(folder, valued_report(folder)) is None


def test_map_has_every_row_at_its_place(folder):
    panel = row_map_panel(folder, valued_report(folder))
    left, kept, bare = (drawn(panel, name) for name in ("left out", "kept", "without a value"))
    assert (len(left["x"]), len(kept["x"]), len(bare["x"])) == (30, 10, 2)
    assert set(kept["marker"]["color"]) == {1.0, 0.25}
    assert kept["marker"]["symbol"] != left["marker"]["symbol"]
    assert set(kept["customdata"]) == set(KEPT)
    table = scores_table()
    span = float(np.ptp(table["x"].to_numpy()))
    first = next(i for i, s in enumerate(table["selected"].to_pylist()) if s)
    assert kept["x"][0] == pytest.approx(table["x"][first].as_py(), abs=span / 500)
    assert len(repr(kept["x"][0])) <= 6
    axis = panel.figure["layout"]["coloraxis"]
    assert axis["cmin"] == -axis["cmax"]
    assert "grey zero" in panel.note
    assert [r[:4] for r in panel.rows[:2]] == [("2", 1.0, 8, 8), ("0", 0.25, 8, 2)]
    assert panel.rows[-1][:4] == ("(none)", None, 2, 0)


def test_map_of_many_rows_is_an_even_sample_that_the_seed_draws(folder, monkeypatch):
    monkeypatch.setattr(row_map, "MOST", 21)
    panel = row_map_panel(folder, valued_report(folder))
    groups = [c for t in panel.figure["data"] if "text" in t for c in t["customdata"]]
    assert len(groups) == 21
    assert all(4 <= groups.count(c) <= 5 for c in range(5) if groups.count(c))
    assert "21 of 42 rows" in panel.note
    assert panel.figure == row_map_panel(folder, valued_report(folder)).figure


def test_map_of_values_of_one_sign_puts_grey_midway(folder):
    table = scores_table()
    column = pa.array([None if s is None else s + 1.0 for s in table["score"].to_pylist()], pa.float64())
    pq.write_table(table.set_column(1, "score", column), folder / "scores.parquet")
    panel = row_map_panel(folder, valued_report(folder))
    axis = panel.figure["layout"]["coloraxis"]
    assert (axis["cmin"] + axis["cmax"]) / 2 == pytest.approx(1.25)
    assert "grey midway" in panel.note


def test_map_needs_places(folder):
    rewrite(folder, ["x"])
    assert row_map_panel(folder, valued_report(folder)) is None


def test_values_are_ranked_with_intervals_and_the_text_of_their_rows(folder):
    panel = cluster_values_panel(folder, valued_report(folder))
    assert [r[0] for r in panel.rows] == [2, 0, 3, 4, 1]
    assert panel.rows[0][1:6] == (1.0, pytest.approx(0.804), pytest.approx(1.196), 8, 0.2)
    assert panel.rows[1][2:4] == (None, None)
    assert panel.rows[0][6].startswith("question 2 <img src=x")
    (trace,) = panel.figure["data"]
    assert trace["x"] == sorted(VALUES, reverse=True)
    assert trace["error_x"]["array"][:2] == [pytest.approx(0.196), 0.0]
    assert "negative loss per token" in panel.note
    assert "2 of 4 intervals lie off zero" in panel.note


def test_accuracy_is_told_from_loss(folder):
    panel = cluster_values_panel(folder, valued_report(folder, empty=0.25, full=0.5))
    assert "accuracy" in panel.note
    assert "share right" in panel.figure["layout"]["xaxis"]["title"]["text"]


def test_many_clusters_are_shown_from_both_ends(folder):
    pq.write_table(clusters_table(100, range(100)), folder / "clusters.parquet")
    panel = cluster_values_panel(folder, valued_report(folder))
    assert [r[0] for r in panel.rows] == [*range(99, 69, -1), *range(29, -1, -1)]
    (trace,) = panel.figure["data"]
    assert trace["y"] == [*range(30), *range(31, 61)]
    assert panel.figure["layout"]["yaxis"]["ticktext"][30] == "… 40 more …"
    assert "30 best and the 30 worst of 100" in panel.note


def test_clusters_that_are_labels_are_called_by_them(folder):
    table = scores_table().drop_columns(["x", "y"])
    names = [None if c is None else HOSTILE[c] for c in table["cluster"].to_pylist()]
    pq.write_table(table.set_column(5, "domain", pa.array(names, pa.string())), folder / "scores.parquet")
    panel = cluster_values_panel(folder, valued_report(folder))
    assert panel.rows[0][0] == HOSTILE[2]
    assert "nearest" not in pool_rows_panel(folder, valued_report(folder)).note


def test_trust_says_what_was_spent_and_what_it_shows(folder):
    panel = trust_panel(folder, valued_report(folder))
    told = {what: (measured, meaning) for what, measured, meaning in panel.rows}
    assert told["evaluations"] == ("58 of 60", "spent of the budget; 2 failed and told nothing")
    assert (told["v of no cluster"][0], told["v of all clusters"][0]) == ("−5.000", "−4.000")
    assert told["noise of one evaluation"][0] == "0.05"
    assert told["mean value of a cluster"][0] == "0.2"
    assert "4 times the noise" in told["mean value of a cluster"][1]
    assert told["predicted correlation with true values"][0] == "0.9"
    assert told["ranking resolvable"][0] == "yes"
    assert told["agreement with the surrogate"][0] == "0.5"
    assert told["effective clusters of the draw"][0] == "1.2"
    assert "12 rows of the target" in panel.note


def test_trust_leaves_out_what_was_not_measured(folder):
    noise = {"sd": None, "margin": None, "predicted_rho": None, "resolvable": None}
    changes = {"surrogate_correlation": None, "effective_clusters": None, "failed": 0, "empty": None, "full": None}
    panel = trust_panel(folder, valued_report(folder, noise=noise, **changes))
    assert [r[:2] for r in panel.rows] == [("evaluations", "58 of 60"), ("ranking resolvable", "not known")]


def test_removal_curves_have_the_same_ends(folder):
    panel = removal_panel(folder, valued_report(folder))
    best, worst = panel.figure["data"]
    assert (best["y"], worst["y"]) == ([-4.0, -4.8, -5.0], [-4.0, -3.8, -5.0])
    assert best["error_y"]["array"] == [0.0, pytest.approx(0.098), 0.0]
    assert panel.rows[1] == ("50%", -4.8, -3.8)
    assert "on average 1 above" in panel.note


def test_removal_says_when_the_order_is_upside_down(folder):
    removal = {"share": [0.0, 0.5, 1.0], "without_best": [1.0, 0.9, 0.0], "without_worst": [1.0, 0.4, 0.0]}
    assert "0.5 BELOW" in removal_panel(folder, valued_report(folder, removal=removal)).note
    removal["without_best"][1] = None
    panel = removal_panel(folder, valued_report(folder, removal=removal, noise=None))
    assert "Here" not in panel.note
    assert "error_y" not in panel.figure["data"][0]


def test_pool_rows_are_of_both_ends_kept_or_not(folder):
    panel = pool_rows_panel(folder, valued_report(folder))
    at = {name: i for i, name in enumerate(panel.columns)}
    ends = [r[at["end"]] for r in panel.rows]
    assert ends == ["highest"] * ends.count("highest") + ["lowest"] * ends.count("lowest")
    values = [r[at["value"]] for r in panel.rows]
    assert values[:2] == [1.0, 1.0]
    assert values[-2:] == [-0.5, -0.5]
    assert max(values.count(v) for v in VALUES) == 2
    # The nearest to the middle is the last of its cluster.
    best = panel.rows[0]
    assert best[at["id"]] == row_id(37)
    assert best[at["question or text"]].startswith("question 37")
    assert best[at["answer"]] == "answer 37"
    assert best[at["decision"]] == "kept"


def test_no_row_stands_at_both_ends_of_equal_values(folder):
    table = scores_table()
    pq.write_table(table.set_column(1, "score", pa.array([0.5] * len(table))), folder / "scores.parquet")
    ids = [r[-1] for r in pool_rows_panel(folder, valued_report(folder)).rows]
    assert len(set(ids)) == len(ids) == 12


@pytest.mark.parametrize("harm", ["gone", "changed", "large", "unknown"])
def test_without_the_input_file_ids_remain(folder, harm):
    document = json.loads((folder / "inputs.json").read_text())
    if harm == "gone":
        (folder / "pool.jsonl").unlink()
    elif harm == "changed":
        with (folder / "pool.jsonl").open("a") as file:
            file.write('{"text": "one more"}\n')
    elif harm == "large":
        document["inputs"][0]["bytes"] = 1 << 40
    else:
        document["inputs"] = []
    (folder / "inputs.json").write_text(json.dumps(document))
    panel = pool_rows_panel(folder, valued_report(folder))
    assert "answer" not in panel.columns
    assert panel.rows[0][-1] == row_id(37)
    assert "Texts are missing" in panel.note
    assert cluster_values_panel(folder, valued_report(folder)).rows[0][6] == row_id(2)


def test_rows_of_an_earlier_stage_are_found_beside_it_and_nowhere_else(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "1-first").mkdir()
    (run / "2-pick").mkdir()
    (run / "1-first" / "selected.jsonl").write_bytes((folder / "pool.jsonl").read_bytes())
    entry = {"place": "rows.0", "kind": "rows", "value": "x", "paths": [], "sha256": "", "bytes": 0}
    for relative, count in (("../1-first/selected.jsonl", 1), (str(folder / "pool.jsonl"), 0)):
        document = {"inputs": [{**entry, "relative": relative}]}
        (run / "2-pick" / "inputs.json").write_text(json.dumps(document))
        assert len(find_rows(run / "2-pick", [row_id(3)])) == count


def test_divergence_in_bits():
    assert divergence({"a": 1, "b": 1}, {"a": 5, "b": 5}) == 0.0
    assert divergence({"a": 3}, {"b": 2}) == pytest.approx(1.0)
    # p = (1/2, 1/2), q = (1, 0): H(3/4) - H(1/2) / 2.
    assert divergence({"a": 1, "b": 1}, {"a": 1, "b": 0}) == pytest.approx(0.8112781 - 0.5)


def test_share_kept_falls_back_on_clusters_and_says_how_far_the_mix_differs(folder):
    panel = kept_panel(folder, valued_report(folder))
    assert panel.title == "Share kept by cluster"
    assert panel.rows[:2] == [("cluster 2", 8, 8, 1.0), ("cluster 0", 8, 2, 0.25)]
    total = {**{f"cluster {i}": 8 for i in range(5)}, "(none)": 2}
    expected = divergence(total, {"cluster 2": 8, "cluster 0": 2})
    assert f"{expected:.2f} bits over cluster" in panel.note


def test_share_kept_by_source_and_lengths(folder):
    table = scores_table()
    column = pa.array(["a"] * 21 + ["b"] * 21)
    table = table.set_column(4, "source", column).append_column("tokens", pa.array(range(42)))
    pq.write_table(table, folder / "scores.parquet")
    note = kept_panel(folder, valued_report(folder)).note
    assert re.search(r"0\.\d\d bits over source and 0\.\d\d bits over cluster", note)
    assert "20.5 of any row" in note
    pq.write_table(table.drop_columns(["cluster", "tokens"]), folder / "scores.parquet")
    note = kept_panel(folder, valued_report(folder)).note
    assert "over cluster" not in note
    assert "Median" not in note


@pytest.mark.parametrize(
    ("resolvable", "words"),
    [(True, "is resolvable."), (False, "is NOT resolvable"), (None, "resolvable is not known")],
)
def test_verdict_says_whether_the_ranking_holds(folder, resolvable, words):
    report = valued_report(folder, noise={"resolvable": resolvable})
    sentence = describe(report, {}).sentence
    assert sentence.startswith("10 of 42 usable rows were kept, chosen by shed. ")
    assert "5 clusters were valued with 58 evaluations" in sentence
    assert words in sentence
    assert describe(valued_report(folder, players=None), {}).sentence.endswith("chosen by shed.")


def test_page_of_a_valuation_is_inert_and_small(folder):
    text = write_page(folder, valued_report(folder)).read_text()
    bare = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "<script>document.title" not in text
    assert "<img" not in bare
    assert "<b>pool" not in bare
    titles = ["How far the values", "Values of clusters", "Taking clusters", "Map of the rows", "Rows of the pool"]
    places = [bare.index(f"<h3>{title}") for title in titles]
    assert places == sorted(places)
    assert all(len(note) < 600 for note in re.findall(r'<h3>.*?</h3>\n<p class="quiet">(.*?)</p>', bare))
    assert "characters)</p>" not in bare
    assert all("<" not in i for i in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S))
    assert len(bare) < 120_000
