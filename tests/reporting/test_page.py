"""The page is self-contained, inert, complete, and the same for the same report."""

import json
import re
from types import SimpleNamespace

import pytest
from hostile_texts import HOSTILE, hostile_report
from ruamel.yaml import YAML

from honeloom.reporting.card import Facts, write_card
from honeloom.reporting.licences import licence_warnings
from honeloom.reporting.page import environment, write_page
from honeloom.reporting.panel import ROWS_SHOWN, by_name
from honeloom.reporting.panels.kept_rows import kept_rows_panel
from honeloom.reporting.text import alike, clip, number, seconds, size, visible
from honeloom.stages.inputs import ResolvedInput
from honeloom.types.report import Check, Metric, Report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, hostile_report())


def without_scripts(text):
    return re.sub(r"<script>.*?</script>", "", text, flags=re.S)


def test_page_holds_no_foreign_markup_and_a_strict_policy(page):
    text = page.read_text()
    assert "<script>document.title" not in text
    assert "<img" not in without_scripts(text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe-eval" not in policy
    assert "script-src &#39;sha256-" in policy
    # Only two scripts run (the library and ours); the rest are data.
    assert len(re.findall(r"<script>", text)) == 2
    links = re.findall(r'(?:src|href)="([^"]*)"', without_scripts(text))
    assert links
    assert all(link.startswith("#") for link in links)


def test_page_without_a_chart_carries_no_library_and_runs_no_script(tmp_path):
    details = {"method": "linear", "donor": "a", "lost_delta_fraction": None, "bytes_read": 1, "bytes_written": 1}
    text = write_page(tmp_path, Report("merge", "ok", "/x", 0, None, details=details)).read_text()
    assert "<script>" not in text
    assert "script-src &#39;none&#39;" in text
    assert len(text) < 40_000


def test_long_texts_are_clipped_and_counted(page):
    text = without_scripts(page.read_text())
    assert "1,000,000 characters" in text
    assert "x" * 1000 not in text


def test_marks_that_turn_the_reading_direction_are_spelled_out(page):
    text = without_scripts(page.read_text())
    assert "\u202e" not in text
    assert r"\u202eright to left" in text


def test_page_data_is_json_that_cannot_end_its_element(page):
    islands = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.S)
    assert len(islands) == 2
    for island in islands:
        assert "<" not in island
        assert json.loads(island)["data"]


def test_same_report_gives_the_same_bytes(page, tmp_path):
    assert write_page(tmp_path, hostile_report()).read_bytes() == page.read_bytes()


def test_every_chart_has_a_table_and_a_text(page):
    text = without_scripts(page.read_text())
    charts = re.findall(r'data-figure="([^"]+)" role="img" aria-label="([^"]+)"', text)
    assert len(charts) == text.count("<details><summary>Table: ") == 2
    assert all(len(label) > 40 for _, label in charts)


def test_headline_comes_first_then_warnings_then_the_number(page):
    text = without_scripts(page.read_text())
    places = [text.index(part) for part in ("<h1>", "warnings", '<div class="figure">', "<main")]
    style = text.index("</style>")
    assert text[style:].index("<h1>") < text[style:].index('class="warnings"') < text[style:].index('class="figure"')
    assert places[-1] > places[0]
    head = re.search(r"<h1>(.*?)</h1>", text).group(1)
    assert head.startswith("The model is better than ")
    assert "4.0 → " not in head
    assert re.search(r'<p class="value"><span class="quiet">4.000</span>.*→</span> 3.000 ', text)
    assert "difference −1.000, 95% interval −2.000 to −0.500, over the same 3 rows" in text


def test_a_failed_claim_is_told_at_the_top(tmp_path):
    report = Report("evaluate", "failed", "/x", 0, None, verification=(Check("a", 1, 0, False), Check("b", 0, 0, True)))
    text = write_page(tmp_path, report).read_text()
    assert "1 of 2 claims failed" in text
    assert "not published" in text
    assert "✗ NO" in text


def test_a_long_table_says_where_the_rest_is(tmp_path):
    metrics = tuple(Metric("loss", 1.0, 1, "nats/token", False, None, f"d{i}") for i in range(ROWS_SHOWN + 5))
    text = write_page(tmp_path, Report("evaluate", "ok", "/x", 0, None, metrics=metrics)).read_text()
    assert f"The first {ROWS_SHOWN} of {ROWS_SHOWN + 5} rows; all of them are in <code>report.json</code>" in text
    assert "60 of 305 groups" in text


def test_metrics_without_a_value_are_listed_and_not_drawn(tmp_path):
    metrics = (Metric("loss", None, 1, "nats/token", False, None, "all"),)
    text = write_page(tmp_path, Report("evaluate", "ok", "/x", 0, None, metrics=metrics)).read_text()
    assert "data-figure" not in text
    assert "<td>loss</td>" in text or ">loss<" in text


def test_names_are_placed_by_number_so_that_none_is_read_as_a_date():
    axis = by_name(["2026", "2026-01-01", "x" * 200, "x" * 200])
    assert axis["tickvals"] == [0, 1, 2, 3]
    assert len(axis["ticktext"]) == 4


def test_island_escapes_but_keeps_the_value():
    island = str(environment().filters["island"]({"a": "</script>&<b>"}))
    assert "<" not in island
    assert json.loads(island) == {"a": "</script>&<b>"}


def test_kept_rows_of_both_ends_are_those_of_the_file(hostile_selection):
    report = Report.from_json(json.loads((hostile_selection / "report.json").read_bytes()))
    panel = kept_rows_panel(hostile_selection, report)
    scores = [row[0] for row in panel.rows]
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    rows = [json.loads(line) for line in (hostile_selection / "selected.jsonl").read_text().splitlines()]
    known = {(r["instruction"][:160], r["output"][:160]) for r in rows}
    assert {(row[2], row[3]) for row in panel.rows} <= known
    longest = max(rows, key=lambda r: len(r["output"].split()))
    assert panel.rows[0][3][:50] in {r["output"][:50] for r in rows if len(r["output"]) >= len(longest["output"]) / 2}


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (0.0, "0"), (-3.30611, "−3.306"), (2352, "2,352"), (1234567.8, "1,234,568")],
)
def test_numbers(value, text):
    assert number(value) == text


def test_texts():
    assert alike(4.1433, 0.8372, -3.3061) == ["4.143", "0.837", "−3.306"]
    assert alike(0.0, 0.0) == ["0.0", "0.0"]
    assert (seconds(9.83), seconds(125), seconds(7325)) == ("9.83 s", "2 min 05 s", "2 h 02 min")
    assert (size(512), size(1 << 20)) == ("512 bytes", "1 MiB")
    assert (size(1010 << 20), size(999.4 * 1024), number(12345.6), number(9999.4)) == (
        "1,010 MiB", "999 KiB", "12,346", "9999",
    )  # fmt: skip
    assert clip("abc", 2) == "ab… (3 characters)"
    assert visible("a\u202eb\x1b[0m") == r"a\u202eb\u001b[0m"


def card(folder, inputs, report=None, relation="adapter"):
    write_card(folder, report or hostile_report(), inputs, relation)
    text = (folder / "README.md").read_text()
    return text.split("---\n", 2)[1], text.split("---\n", 2)[2]


def test_card_escapes_markdown_and_names_only_hub_ids(tmp_path):
    inputs = [
        ResolvedInput("model", "model", "org/base@main", (), "a" * 64, 1, revision="abc"),
        ResolvedInput("rows.0", "rows", "/home/me/[click](javascript:x)|<b>.jsonl", (), "b" * 64, 1),
    ]
    front, body = card(tmp_path, inputs)
    assert YAML(typ="safe").load(front) == {
        "tags": ["honeloom"], "library_name": "peft", "base_model": ["org/base"], "base_model_relation": "adapter",
    }  # fmt: skip
    assert "/home/me" not in front + body
    assert "<b>" not in body
    assert "<script>" not in body
    assert r"\[click\]" in body


def test_card_says_the_verdict_warnings_numbers_and_licence_in_order(tmp_path):
    _, body = card(tmp_path, [])
    order = ["is better than", "## Warnings", "## Measured", "## Verified", "## Made from", "## Licences"]
    places = [body.index(part) for part in order]
    assert places == sorted(places)
    assert "4.000 → **3.000** nats/token" in body
    assert "x" * 1000 not in body


@pytest.mark.parametrize("name", ["a: b", "- a", "'", "&x", "no", "1e3", "<b>"])
def test_front_matter_is_valid_whatever_the_names(tmp_path, name):
    inputs = [SimpleNamespace(place="rows.0", kind="rows", value=f"org/{name}", fingerprint="c" * 64, revision="r")]
    front, _ = card(tmp_path, inputs, relation=None)
    assert YAML(typ="safe").load(front) == {"tags": ["honeloom"], "datasets": [f"org/{name}"]}


def test_table_cells_of_the_card_stay_in_their_columns(tmp_path):
    _, body = card(tmp_path, [])
    table = [line for line in body.splitlines() if line.startswith("| loss |")]
    assert len(table) == len(HOSTILE) + 1
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in table)


def test_the_card_tells_rows_licences_and_what_to_beware_of(tmp_path):
    inputs = [
        ResolvedInput("models.0.model", "model", "org/one", (), "a" * 64, 1, revision="r"),
        ResolvedInput("models.1.model", "model", "/data/two", (), "b" * 64, 1),
        ResolvedInput("rows.0", "rows", "/data/mine.jsonl", (), "c" * 64, 1),
        ResolvedInput("rows.1", "rows", "/data/mine.jsonl", (), "c" * 64, 1),
    ]
    facts = {
        "a" * 64: Facts(("apache-2.0",)),
        "b" * 64: Facts(("cc-by-nc-4.0",)),
        "c" * 64: Facts(("unknown",), rows=1200, files=2, withdrawn=3),
    }
    write_card(tmp_path, hostile_report(), inputs, "merge", facts=facts, parents=["org/zero"])
    text = (tmp_path / "README.md").read_text()
    front = YAML(typ="safe").load(text.split("---\n", 2)[1])
    assert front["base_model"] == ["org/one", "org/zero"]
    assert front["base_model_relation"] == "merge"
    assert "license" not in front
    assert "| rows.0, rows.1 | mine.jsonl | 1,200, less 3 withdrawn in 2 files | unknown |" in text
    assert "- The licence of mine.jsonl is not known here" in text
    assert "- Commercial use is not allowed (two: cc-by-nc-4.0)." in text
    write_card(tmp_path, hostile_report(), inputs[:1], "merge", facts=facts)
    assert YAML(typ="safe").load((tmp_path / "README.md").read_text().split("---\n", 2)[1])["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (["apache-2.0", "mit"], []),
        (["cc-by-nd-4.0"], ["Adapted versions may not be shared"]),
        (["llama3.1"], ["Terms of its own"]),
        (["gpl-3.0", "cc-by-nc-4.0"], ["Commercial use", "gpl-3.0 and cc-by-nc-4.0 ask for what excludes each other"]),
        (["cc-by-sa-4.0", "gpl-3.0"], ["Several licences each ask for themselves: cc-by-sa-4.0, gpl-3.0"]),
        (["gpl-2.0", "gpl-3.0"], []),
        (["cc-by-nc-sa-4.0"], ["Commercial use"]),
        (["unknown"], ["The licence of x is not known"]),
    ],
)
def test_licences_that_restrict_or_exclude_each_other(licences, said):
    found = licence_warnings({licence: ["x"] for licence in licences})
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))
