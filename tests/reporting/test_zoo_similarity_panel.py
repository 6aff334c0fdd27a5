"""The panel of a zoo: every pair of models, the clusters, the tree, and its table."""

import numpy as np
import pytest
from hostile_texts import HOSTILE

from honeloom.merging.clusters import find_clusters
from honeloom.merging.similarity import Similarity
from honeloom.reporting.page import write_page
from honeloom.reporting.panels import PANELS
from honeloom.reporting.panels.zoo_similarity import similarity_panel
from honeloom.stages.zoo_clusters import Bucket, ZooClusters
from honeloom.types.report import Report

PAIRS = {("a", "b"): 0.99, ("a", "c"): 0.97, ("b", "c"): 0.96, ("a", "d"): 0.3, ("b", "d"): 0.2, ("c", "d"): -0.1}


def square(names, pairs):
    found = np.eye(len(names))
    for (one, other), value in pairs.items():
        i, j = names.index(one), names.index(other)
        found[i, j] = found[j, i] = value
    return found


def bucket(names, pairs, method, threshold=0.95):
    values = square(list(names), pairs)
    similarity = Similarity(tuple(names), {"all": values, "delta_all": values / 2 + np.eye(len(names)) / 2})
    key = similarity.matrices["all"]
    return Bucket(similarity, find_clusters(names, key, threshold, method))


def write_zoo(folder, method="average", measure="weights", buckets=None, alone=None):
    """Four models that can be merged, d unlike the others, and one of another size; one refused."""
    buckets = buckets or (bucket("abcd", PAIRS, method), bucket(("large",), {}, method))
    clusters = sorted((g for b in buckets for g in b.clusters.groups), key=lambda g: (-len(g), g))
    alone = alone or {"d": "similarity is 0.3", "large": "hidden_size is 32 and 64"}
    zoo = ZooClusters(
        tuple(clusters), 0.95, method, measure, tuple(buckets), (("broken", "it is truncated"),), alone
    )  # fmt: skip
    zoo.write(folder)
    return Report("glue", "ok", str(folder), 0, None, details=zoo.to_json())


def trace(panel, kind):
    return [t for t in panel.figure["data"] if t["type"] == kind]


def test_it_is_absent_without_the_files(tmp_path):
    assert similarity_panel(tmp_path, Report("glue", "ok", str(tmp_path), 0, None)) is None


@pytest.mark.parametrize("method", ["leader", "average", "complete"])
def test_the_table_has_every_model(tmp_path, method):
    panel = similarity_panel(tmp_path, write_zoo(tmp_path, method))
    rows = {row[0]: row[1:] for row in panel.rows}
    assert rows == {
        "a": (1, "b", 0.99, ""), "b": (1, "a", 0.99, ""), "c": (1, "a", 0.97, ""),
        "d": (2, "a", 0.3, "similarity is 0.3"), "large": (3, None, None, "hidden_size is 32 and 64"),
        "broken": (None, None, None, "it is truncated"),
    }  # fmt: skip
    assert panel.rows[-1][0] == "broken"
    assert "3 clusters" in panel.alt
    assert "Cells are empty" in panel.note


def test_the_heat_map_is_in_the_order_of_the_tree(tmp_path):
    panel = similarity_panel(tmp_path, write_zoo(tmp_path))
    (cells,) = trace(panel, "heatmap")
    names = panel.figure["layout"]["yaxis"]["ticktext"]
    assert names == [row[0] for row in panel.rows[:5]] == panel.figure["layout"]["xaxis"]["ticktext"]
    assert set(names[:4]) == set("abcd")
    a, d, large = (names.index(n) for n in ("a", "d", "large"))
    assert cells["z"][a][d] == cells["z"][d][a] == 0.3
    assert cells["z"][a][large] is None
    assert cells["z"][large][large] == 1
    assert (cells["zmin"], cells["zmax"]) == (-0.1, 1)
    assert cells["text"][a][d] == "a and d: 0.3"
    assert cells["texttemplate"] == "%{z:.3f}"
    # The frame is round a, b and c; those alone have none.
    (frame,) = [s for s in panel.figure["layout"]["shapes"] if s["type"] == "rect"]
    at = [names.index(n) for n in "abc"]
    assert (frame["x0"], frame["x1"]) == (frame["y0"], frame["y1"]) == (min(at) - 0.5, max(at) + 0.5)


def test_the_tree_joins_neighbours_and_is_cut_at_the_threshold(tmp_path):
    panel = similarity_panel(tmp_path, write_zoo(tmp_path))
    (tree,) = trace(panel, "scatter")  # a bucket of one has no tree
    names = panel.figure["layout"]["yaxis"]["ticktext"]
    brackets = [(tree["x"][i : i + 4], tree["y"][i : i + 4]) for i in range(0, len(tree["x"]), 5)]
    assert (
        [x[1] for x, _ in brackets]
        == [x[2] for x, _ in brackets]
        == pytest.approx([0.01, (0.03 + 0.04) / 2, (0.7 + 0.8 + 1.1) / 3])
    )
    assert {names[int(v)] for v in brackets[0][1]} == {"a", "b"}
    assert brackets[0][0][0] == brackets[0][0][3] == 0  # leaves
    ends = dict(zip(brackets[1][1], brackets[1][0], strict=True))
    assert ends[names.index("c")] in (0, pytest.approx(0.035))
    assert sum(brackets[0][1]) / 4 in brackets[1][1]  # the pair's middle
    (cut,) = [s for s in panel.figure["layout"]["shapes"] if s["type"] == "line"]
    assert (cut["xref"], cut["x0"], cut["x1"]) == ("x2", pytest.approx(0.05), pytest.approx(0.05))
    assert panel.figure["layout"]["xaxis"]["domain"][1] < panel.figure["layout"]["xaxis2"]["domain"][0]
    assert "dashed line" in panel.note


def test_the_leader_rule_has_a_tree_to_look_at(tmp_path):
    panel = similarity_panel(tmp_path, write_zoo(tmp_path, "leader"))
    assert trace(panel, "scatter")
    assert "whose leader it is more than 0.95 similar to" in panel.note
    assert "did not make the families" in panel.note


def test_deltas_are_shown_where_they_decided(tmp_path):
    panel = similarity_panel(tmp_path, write_zoo(tmp_path, measure="deltas"))
    rows = {row[0]: row[1:] for row in panel.rows}
    assert rows["d"][:3] == (2, "a", 0.15)
    assert "task vectors" in panel.note
    assert "task vectors" in panel.figure["layout"]["xaxis"]["title"]["text"]


@pytest.mark.parametrize(("count", "written", "has_tree"), [(9, "%{z:.2f}", True), (20, "%{z:.2f}", True),
                                                            (21, None, True), (60, None, False)])  # fmt: skip
def test_many_models(tmp_path, count, written, has_tree):
    names = [f"m{i:02d}" for i in range(count)]
    rng = np.random.default_rng(0)
    pairs = {(a, b): float(rng.uniform(0, 0.9)) for i, a in enumerate(names) for b in names[:i]}
    report = write_zoo(tmp_path, buckets=(bucket(names, pairs, "average"),), alone=dict.fromkeys(names, "far"))
    panel = similarity_panel(tmp_path, report)
    (cells,) = trace(panel, "heatmap")
    assert cells.get("texttemplate") == written
    assert cells["showscale"] == (written is None)
    assert bool(trace(panel, "scatter")) == has_tree
    assert len(cells["z"]) == min(count, 48)
    assert sum(len(t["x"]) for t in trace(panel, "scatter")) + len(cells["z"]) ** 2 <= 5000
    assert ("The chart has the first 48 of 60 models." in panel.note) == (count == 60)
    assert len(panel.rows) == count + 1


def test_plotly_knows_every_setting(tmp_path):
    objects = pytest.importorskip("plotly.graph_objects")
    panel = similarity_panel(tmp_path, write_zoo(tmp_path))

    def dressed(value):
        if isinstance(value, dict):
            return {key: dressed(v) for key, v in value.items()}
        if isinstance(value, list):
            return [dressed(v) for v in value]
        return "#123456" if isinstance(value, str) and value.startswith("--") else value

    assert len(objects.Figure(dressed(panel.figure)).data) == 2


def test_a_page_with_hostile_names(tmp_path, monkeypatch):
    names = [f"{text[:60]} {i}" for i, text in enumerate(HOSTILE)]
    pairs = {(a, b): 0.97 for i, a in enumerate(names) for b in names[:i]}
    report = write_zoo(tmp_path, buckets=(bucket(names, pairs, "average"),), alone={"none": "all are alike"})
    monkeypatch.setitem(PANELS, "glue", (similarity_panel,))
    page = write_page(tmp_path, report).read_text(encoding="utf-8")
    assert "How alike the models are" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
