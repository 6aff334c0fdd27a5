"""Panels of a selection by domains: what they show, and that they are absent where their data is."""

import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from domain_folder import CURVE, PER_DOMAIN, SWEEP, domain_report, domain_scores, write_domains
from hostile_texts import HOSTILE
from valued_folder import write_valued

from honeloom.reporting.page import write_page
from honeloom.reporting.panel import SERIES
from honeloom.reporting.panels import PANELS
from honeloom.reporting.panels.band_curve import band_curve_panel
from honeloom.reporting.panels.cluster_values import cluster_values_panel
from honeloom.reporting.panels.confusion import labels_panel, probe_panel
from honeloom.reporting.panels.depth_sweep import depth_sweep_panel
from honeloom.reporting.panels.domain_maps import domain_map_panel, entropy_map_panel
from honeloom.reporting.panels.domain_mix import domain_mix_panel
from honeloom.reporting.panels.domain_rows import grouped, largest_first
from honeloom.reporting.panels.entropy import entropy_panel
from honeloom.reporting.panels.pool_rows import pool_rows_panel
from honeloom.reporting.panels.row_map import row_map_panel
from honeloom.reporting.panels.scores import divergence, kept_panel, scores_panel
from honeloom.reporting.text import number

BY_ROWS = [domain_map_panel, entropy_map_panel, entropy_panel, probe_panel, labels_panel, domain_mix_panel]


@pytest.fixture
def folder(tmp_path):
    write_domains(tmp_path)
    return tmp_path


def change(folder, table=None, without=(), **columns):
    """The scores with other columns."""
    table = domain_scores() if table is None else table
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table.drop_columns(list(without)), folder / "scores.parquet")


def points(panel, name):
    """Points of a legend's entry: left out, then kept."""
    return [t for t in panel.figure["data"] if t.get("legendgroup") == name and "text" in t]


def test_every_panel_is_absent_for_another_method(tmp_path):
    report = write_valued(tmp_path)
    assert [make(tmp_path, report) for make in (*BY_ROWS, band_curve_panel, depth_sweep_panel)] == [None] * 8


@pytest.mark.parametrize(
    ("column", "makers"),
    [
        ("x", [domain_map_panel, entropy_map_panel]),
        ("entropy", [entropy_map_panel, entropy_panel]),
        ("probe_domain", [probe_panel]),
        ("domain", [labels_panel]),
        ("pseudo_domain", BY_ROWS),
    ],
)
def test_a_panel_needs_its_column(folder, column, makers):
    report = domain_report(folder)
    change(folder, domain_scores(labels=["one", "two", "three"]))
    assert all(make(folder, report) for make in makers)
    change(folder, domain_scores(labels=["one", "two", "three"]), without=[column])
    assert [make(folder, report) for make in makers] == [None] * len(makers)
    empty = pa.nulls(2 * PER_DOMAIN + 1, pa.float64() if column in ("x", "entropy") else pa.string())
    change(folder, domain_scores(labels=["one", "two", "three"]), **{column: empty})
    assert [make(folder, report) for make in makers] == [None] * len(makers)


def test_panels_about_values_of_clusters_leave_domains_alone(folder):
    report = domain_report(folder)
    assert cluster_values_panel(folder, report) is None
    assert row_map_panel(folder, report) is None
    assert scores_panel(folder, report) is None
    assert kept_panel(folder, report) is None
    assert scores_panel(folder, domain_report(folder, reward="predicted")).title == "Scores of daar"
    change(folder, source=pa.array(["one"] * 6 + ["two"] * 7))
    panel = kept_panel(folder, report)
    assert panel.title == "Share kept by source"
    assert "cluster" not in panel.note


def test_rows_of_the_pool_are_ranked_by_their_own_value(folder):
    panel = pool_rows_panel(folder, domain_report(folder))
    values = [math.log(2) * p / 12 for p in (11, 11, 9, 9, 7, 7, 5, 5, 3, 3, 1, 1)]
    assert [r[1] for r in panel.rows] == pytest.approx(values)
    assert panel.columns[2] == "pseudo-domain"
    assert {r[2] for r in panel.rows[:2]} == {"a", "b"}
    assert "clusters" not in panel.note
    assert pool_rows_panel(folder, domain_report(folder, method="band")) is None


def test_map_gives_every_domain_its_colour_and_symbol(folder):
    panel = domain_map_panel(folder, domain_report(folder))
    left, kept = points(panel, "a")
    assert (len(left["x"]), len(kept["x"])) == (4, 2)
    assert left["marker"]["color"] == kept["marker"]["color"] == SERIES[0]
    assert left["marker"]["symbol"] == kept["marker"]["symbol"] != points(panel, "b")[0]["marker"]["symbol"]
    assert "line" in kept["marker"] and "line" not in left["marker"]
    assert kept["x"] == [0.2, 0.25]
    assert [len(t["x"]) for t in points(panel, "without a domain")] == [1]
    assert [r[:3] for r in panel.rows] == [("a", 6, 2), ("b", 6, 2), ("(none)", 1, 0)]
    assert "others" not in json.dumps(panel.figure)


@pytest.mark.parametrize(("count", "grey"), [(6, []), (7, ["domain 06"]), (9, ["3 others"])])
def test_map_shows_domains_beyond_the_palette_in_grey(tmp_path, count, grey):
    names = [f"domain {k:02d}" for k in range(count)]
    panel = domain_map_panel(tmp_path, write_domains(tmp_path, names))
    headings = [t for t in panel.figure["data"] if t["x"] == [None]]
    assert [t["name"] for t in headings if t["marker"]["color"] == "--chart-grey"] == [*grey, "without a domain"]
    assert len({(t["marker"]["color"], t["marker"]["symbol"]) for t in headings}) == len(headings)
    assert sum(len(t["x"]) for t in panel.figure["data"] if "text" in t) == count * PER_DOMAIN + 1
    assert ("smallest domains are grey" in panel.note) == (count == 9)


def test_map_is_by_label_where_the_domains_are_the_labels(folder):
    change(folder, domain=domain_scores()["pseudo_domain"])
    report = domain_report(folder, method="band", probe=None)
    assert domain_map_panel(folder, report).title == "Map by label"
    assert labels_panel(folder, report) is None
    assert {r[0] for r in domain_mix_panel(folder, report).rows} == {"label"}


def test_entropy_map_is_coloured_from_zero(folder):
    panel = entropy_map_panel(folder, domain_report(folder))
    axis = panel.figure["layout"]["coloraxis"]
    assert axis["cmin"] == 0.0
    assert 0 < axis["cmax"] <= math.log(2)
    kept = points(panel, "kept")[0]
    assert kept["marker"]["color"] == [float(f"{math.log(2) * p / 12:.4g}") for p in (9, 11, 9, 11)]
    assert kept["text"][0] == "row-004, a"
    assert points(panel, "without an entropy")[0]["text"] == ["row-012, (none)"]
    assert [r[:3] for r in panel.rows] == [("a", 6, 2), ("b", 6, 2)]
    assert panel.rows[0][3] == pytest.approx(math.log(2) / 2)


def test_entropy_goes_from_zero_to_equal_chances(folder):
    panel = entropy_panel(folder, domain_report(folder))
    every, kept = panel.figure["data"]
    assert (sum(every["y"]), sum(kept["y"])) == (12, 4)
    assert (panel.rows[0][0], panel.rows[-1][1]) == (0.0, pytest.approx(math.log(2)))
    assert panel.figure["layout"]["shapes"][0]["x0"] == pytest.approx(math.log(2))
    assert "0.693, at the dotted line, is that of equal chances for 2 domains" in panel.note
    assert "1 row without an entropy" in panel.note
    assert "logarithmic" not in panel.note
    bare = entropy_panel(folder, domain_report(folder, probe=None, domains=None))
    assert bare.figure["layout"]["shapes"] == []


def test_steep_entropies_have_a_logarithmic_axis(tmp_path):
    report = write_domains(tmp_path, [f"{k:03d}" for k in range(10)])
    values = [0.001] * 50 + [0.1 * k for k in range(1, 11)] + [None]
    change(tmp_path, domain_scores([f"{k:03d}" for k in range(10)]), entropy=pa.array(values, pa.float64()))
    panel = entropy_panel(tmp_path, report)
    assert panel.figure["layout"]["yaxis"]["type"] == "log"
    assert "logarithmic" in panel.note


def test_probe_is_compared_with_the_pseudo_domains(folder):
    panel = probe_panel(folder, domain_report(folder))
    assert panel.columns == ("pseudo-domain", "rows", "as a", "as b")
    assert panel.rows == [("a", 6, 4, 2), ("b", 6, 2, 4)]
    (trace,) = panel.figure["data"]
    assert trace["z"] == [[0.6667, 0.3333], [0.3333, 0.6667]]
    assert trace["text"][0][1] == "2 of 6 rows of a: b"
    assert "marker" not in trace
    assert "8 of 12 rows, 66.7%" in panel.note


def test_heat_maps_group_what_they_have_no_room_for(tmp_path):
    names = [f"domain {k:02d}" for k in range(20)]
    report = write_domains(tmp_path, names, [f"label {k:02d}" for k in range(30)])
    panel = probe_panel(tmp_path, report)
    assert [r[0] for r in panel.rows] == [*names[:15], "5 others"]
    assert panel.rows[-1][1] == 5 * PER_DOMAIN == sum(panel.rows[-1][2:])
    assert "texttemplate" not in panel.figure["data"][0]
    panel = labels_panel(tmp_path, report)
    assert len(panel.rows) == 24 and len(panel.columns) == 2 + 16
    assert sum(r[1] for r in panel.rows) == 20 * PER_DOMAIN + 1
    assert "7 others" in [r[0] for r in panel.rows]


def test_labels_of_one_domain_stand_together(folder):
    labels = ["m", "z", "m", "m", "m", "m", "k", "k", "k", "k", "k", "z", None]
    change(folder, domain=pa.array(labels))
    panel = labels_panel(folder, domain_report(folder, agreement_with_labels=0.51234))
    assert panel.rows == [("m", 5, 5, 0, 0), ("z", 2, 1, 1, 0), ("k", 5, 0, 5, 0), ("(none)", 1, 0, 0, 1)]
    assert "information: 0.512 " in panel.note


def test_mix_has_shares_before_and_after(folder):
    change(
        folder,
        selected=pa.array([True] * 3 + [False] * 3 + [True] + [False] * 6),
        domain=pa.array(["m", "n"] * 6 + ["m"]),
    )
    panel = domain_mix_panel(folder, domain_report(folder))
    every, kept = panel.figure["data"]
    assert every["x"] == pytest.approx([6 / 13, 6 / 13, 1 / 13])
    assert kept["x"] == [0.75, 0.25, 0.0]
    expected = divergence({"a": 6, "b": 6, "-": 1}, {"a": 3, "b": 1})
    assert f"{expected:.3f} bits over pseudo-domains and" in panel.note
    assert "The table has labels too." in panel.note
    assert panel.rows[0] == ("pseudo-domain", "a", 6, 3, "46.2%", "75.0%")
    assert [r[:2] for r in panel.rows[3:]] == [("label", "m"), ("label", "n")]


def test_mix_needs_kept_rows(folder):
    change(folder, selected=pa.array([False] * 13))
    assert domain_mix_panel(folder, domain_report(folder)) is None


def test_bands_are_compared_with_random_rows(folder):
    base = {"value": -1.875, "stderr": 0.04, "evaluations": 3}
    panel = band_curve_panel(folder, domain_report(folder, band_curve=CURVE, band_baseline=base, score="loss"))
    inter, intra, chosen, random = panel.figure["data"]
    assert (inter["x"], inter["y"]) == ([0, 1], [-2.0, -1.5])
    assert (intra["y"], intra["error_y"]["array"]) == ([-1.75, -1.875], [0.03, 0.03])
    assert (chosen["x"], chosen["y"]) == ([1], [-1.5])
    assert random["y"] == [-1.875, -1.875]
    assert panel.figure["layout"]["xaxis"]["ticktext"] == ["0-20", "80-100"]
    assert panel.figure["layout"]["shapes"][0]["y0"] == pytest.approx(-1.915)
    assert "minus nats per token" in panel.note
    assert "inter 80-100, is 0.38 above random rows (standard error 0.05, from 3 and 3 evaluations)" in panel.note
    assert "picked among 4" in panel.note
    assert panel.rows[1] == ("inter", "80-100", -1.5, 0.03, 3, "chosen")
    assert panel.rows[-1] == ("random rows", "", -1.875, 0.04, 3, "")


def test_bands_without_a_baseline_or_an_error(folder):
    curve = [{**CURVE[1], "stderr": None}, {**CURVE[0], "value": None}]
    panel = band_curve_panel(folder, domain_report(folder, band_curve=curve, band_baseline=None, score="accuracy"))
    assert [t["name"] for t in panel.figure["data"]] == ["inter", "chosen"]
    assert panel.figure["layout"]["shapes"] == []
    assert "share right" in panel.figure["layout"]["yaxis"]["title"]["text"]
    assert panel.note.endswith("Chosen: inter 80-100.")
    base = {"value": -1.4, "stderr": None, "evaluations": 1}
    note = band_curve_panel(folder, domain_report(folder, band_curve=curve, band_baseline=base, score="loss")).note
    assert "is 0.1 below random rows." in note
    assert band_curve_panel(folder, domain_report(folder, band_curve=[curve[1]])) is None


def test_bands_are_in_the_order_of_their_numbers(folder):
    curve = [{**CURVE[0], "band": b} for b in ("100-120", "20-40", "5-20")]
    panel = band_curve_panel(folder, domain_report(folder, band_curve=curve))
    assert panel.figure["layout"]["xaxis"]["ticktext"] == ["5-20", "20-40", "100-120"]


def test_probes_are_shown_by_depth(folder):
    panel = depth_sweep_panel(folder, domain_report(folder, sweep=SWEEP))
    line, chosen = panel.figure["data"]
    assert (line["x"], line["y"], chosen["x"]) == ([0.1, 0.5], [0.9375, 0.875], [0.1])
    assert panel.rows[0] == (0.1, 0.9375, 0.25, 0.01, "chosen")
    assert depth_sweep_panel(folder, domain_report(folder)) is None


def test_names_are_grouped_from_the_most_frequent_on():
    assert largest_first(["b", "a", "(none)", "(none)", "b", "c"]) == ["b", "a", "c", "(none)"]
    assert grouped(["a", "b", "c"], 3) == (["a", "b", "c"], {"a": 0, "b": 1, "c": 2})
    assert grouped(["a", "b", "c", "d"], 3) == (["a", "b", "2 others"], {"a": 0, "b": 1, "c": 2, "d": 2})


def test_nothing_is_written_with_a_sign():
    assert (number(-0.0), number(-0.5)) == ("0", "−0.5")


def test_page_of_domains_is_inert_and_in_order(tmp_path):
    names = [f"{text[:60]} {i}" for i, text in enumerate(HOSTILE * 2)]
    report = write_domains(tmp_path, names, [f"{text[:60]} label" for text in HOSTILE], band_curve=CURVE, sweep=SWEEP)
    text = write_page(tmp_path, report).read_text()
    bare = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "<script>document.title" not in text
    assert "<img" not in bare
    titles = [
        "Value of each band", "Map by pseudo-domain", "Map by entropy", "How unsure the probe is",
        "What the probe takes rows for", "The probe by depth", "Labels in each pseudo-domain", "Mix of domains",
        "Share kept by domain", "Rows of the pool",
    ]  # fmt: skip
    places = [bare.index(f"<h3>{title}") for title in titles]
    assert places == sorted(places)
    assert all(len(note) < 600 for note in re.findall(r'<h3>.*?</h3>\n<p class="quiet">(.*?)</p>', bare))
    assert all("<" not in i for i in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S))
    panels = [make(tmp_path, report) for make in PANELS["select"]]
    figures = [json.dumps(p.figure) for p in panels if p and p.figure]
    assert len(figures) >= 8
    # Colours are names, so that they follow the page.
    assert not any(re.search(r'"#[0-9a-f]{3,6}"|rgba?\(', f) for f in figures)
