"""The page of a run and of a folder of runs: lineage drawn, points of a sweep, links."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

import honeloom
from honeloom.cli.main import _run
from honeloom.errors import OutputExistsError
from honeloom.reporting.lineage_graph import lineage_graph
from honeloom.reporting.page import write_page
from honeloom.reporting.parts import warnings_of
from honeloom.stages.records import render_report
from honeloom.stages.runner import load_report

RECIPE = """version: 1
description: Two choices.
stages:
  pick: {{select: {{rows: {rows}, keep: 50%}}}}
  again: {{select: {{rows: $pick, keep: 50%}}}}
  alone: {{select: {{rows: {rows}, keep: 3}}}}
"""
SWEEP = """sweep: {pick.keep: [50%, 25%, 100%]}
objectives: [{stage: pick, detail: rows_kept}, {stage: again, detail: rows_kept, better: higher}]
"""


@pytest.fixture
def folder(tmp_path, rows):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(rows=rows))
    (tmp_path / "sweep.yaml").write_text(RECIPE.format(rows=rows) + SWEEP)
    honeloom.run(tmp_path / "recipe.yaml", output_dir=tmp_path / "runs" / "plain")
    honeloom.run(tmp_path / "sweep.yaml", output_dir=tmp_path / "runs" / "deep" / "swept")
    return tmp_path / "runs"


def test_the_lineage_is_drawn_and_told(folder):
    run = folder / "plain"
    graph = lineage_graph(run, load_report(run))
    assert [(m.label, m.kind, m.shape) for m in graph.marks] == [
        ("rows.jsonl", "rows", "rows"), ("pick", "select", "stage"), ("again", "select", "result"),
        ("alone", "select", "result"),
    ]  # fmt: skip
    assert graph.links == [("pick", "rows.jsonl"), ("again", "pick"), ("alone", "rows.jsonl")]
    assert len(graph.arcs) == 3
    page = (run / "report.html").read_text()
    svg = ET.fromstring(re.search(r"<svg.*?</svg>", page, re.DOTALL)[0])
    assert svg.find("title").text == "Lineage of the run"
    assert svg.find("desc").text == "pick reads rows.jsonl. again reads pick. alone reads rows.jsonl"
    assert "<script src" not in page
    swept = folder / "deep" / "swept"
    marks = lineage_graph(swept, load_report(swept)).marks
    assert [m.kind for m in marks] == ["rows", "select × 3", "select × 3", "select"]
    single = run / "stages" / "1-pick"
    assert lineage_graph(single, load_report(single)) is None


def test_points_of_a_sweep_are_on_the_page(folder):
    page = (folder / "deep" / "swept" / "report.html").read_text()
    assert "Points of the sweep" in page
    assert "Unbeaten: points 1, 2, 3." in page
    assert "point 2 has the best pick/rows_kept; 3 of the points are unbeaten" in page
    assert "point 2 has the best pick/rows" in (folder / "deep" / "swept" / "README.md").read_text()


def test_a_folder_of_results_has_an_index(folder, capsys):
    (folder / ".late.partial-0123").mkdir()
    (folder / "<b>&").mkdir()
    honeloom.select("lab:dev", keep=5, output_dir=folder / "<b>&" / "one")
    assert _run(["report", str(folder)]) == 0
    path = folder / "index.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    page = path.read_text()
    assert "4 results in" not in page
    assert "3 results in runs" in page
    assert 'href="plain/report.html"' in page
    assert 'href="deep/swept/report.html"' in page
    assert 'href="%3Cb%3E%26/one/report.html"' in page
    assert "<b>" not in page
    assert ".late.partial-0123" in page
    render_report(folder)  # ours is written again
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match="honeloom did not write it"):
        render_report(folder)
    assert path.read_text() == "mine"


def test_licences_travel_from_cards_to_what_is_made(tmp_path, rows, tiny_model):
    rows.with_name("README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    honeloom.select(rows, keep="50%", output_dir=tmp_path / "picked")
    (entry,) = json.loads((tmp_path / "picked" / "inputs.json").read_bytes())["inputs"]
    assert entry["licences"] == ["cc-by-nc-4.0"]
    assert "Commercial use is not allowed (rows.jsonl: cc-by-nc-4.0)" in (tmp_path / "picked" / "README.md").read_text()
    honeloom.tune(tiny_model, tmp_path / "picked", max_steps=1, output_dir=tmp_path / "tuned")
    entries = json.loads((tmp_path / "tuned" / "inputs.json").read_bytes())["inputs"]
    assert {e["place"]: e["licences"] for e in entries} == {"model": ["unknown"], "rows.0": ["cc-by-nc-4.0"]}
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "| rows.0 | picked | 6 in 1 file | cc-by-nc-4.0 |" in card
    rows.with_name("README.md").write_text("---\nlicense: [a, {\n---\n")  # whatever a card holds, it is only asked
    honeloom.select(rows, keep="25%", output_dir=tmp_path / "other")
    assert json.loads((tmp_path / "other" / "inputs.json").read_bytes())["inputs"][0]["licences"] == ["unknown"]


def test_warnings_that_say_the_same_stand_once_and_many_fold(folder):
    run = folder / "plain"
    report = load_report(run)
    said = [*(f"{s}: rows were cut" for s in ("a", "b", "b.without-a", "b.2-1", "c.1")), *(f"a: {i}" for i in range(9))]
    told = replace(report, warnings=tuple(said))
    assert warnings_of(told) == ["a, b, c.1: rows were cut", *(f"a: {i}" for i in range(9))]
    assert warnings_of(replace(told, verb="select")) == said
    page = write_page(run, told).read_text()
    assert page.index("a, b, c.1: rows were cut") < page.index("<summary>and 4 more") < page.index("a: 8")
    assert "10 warnings" in page
    write_page(run, report)
