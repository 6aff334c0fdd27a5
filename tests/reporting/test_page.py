"""The page is self-contained and inert, whatever it shows."""

import json
import re
import shutil
import subprocess

import pytest

from honeloom.reporting.card import write_card
from honeloom.reporting.page import environment, write_page
from honeloom.stages.inputs import ResolvedInput
from honeloom.types.report import Artefact, Check, Cost, Metric, Report

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "javascript:document.title='pwned'",
    "\u202eright to left",
    "x" * 1_000_000,
    "'\"`${document.title='pwned'}",
]


def hostile_report():
    return Report(
        verb="evaluate",
        status="ok",
        out="/tmp/" + HOSTILE[0],
        seed=0,
        artefact=Artefact("scores", "/tmp/x", "0" * 64),
        metrics=tuple(Metric("loss", float(i), 3, "nats/token", False, 0.1, text) for i, text in enumerate(HOSTILE)),
        verification=tuple(Check(text, text, None, True) for text in HOSTILE[:5]),
        warnings=tuple(HOSTILE[:5]),
        cost=Cost(1.0, 1.0, 1 << 20),
        details={"description": HOSTILE[1]},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, hostile_report())


def test_page_holds_no_foreign_markup_and_a_strict_policy(page):
    text = page.read_text()
    assert "<script>document.title" not in text
    assert "<img" not in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe-eval" not in policy
    assert "script-src &#39;sha256-" in policy
    # Only two scripts run (the library and ours); the rest are data.
    assert len(re.findall(r"<script>", text)) == 2
    assert not re.search(r'(?:src|href)="https?:', re.sub(r"<script>.*?</script>", "", text, flags=re.S))


def test_page_data_is_json_that_cannot_end_its_element(page):
    for island in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.S):
        assert "<" not in island
        assert json.loads(island)["data"]


def test_island_escapes_but_keeps_the_value():
    island = str(environment().filters["island"]({"a": "</script>&<b>"}))
    assert "<" not in island
    assert json.loads(island) == {"a": "</script>&<b>"}


@pytest.mark.browser
def test_hostile_text_does_not_run_in_a_browser(page, require):
    chromium = require(shutil.which("chromium") or shutil.which("chromium-browser"), "Chromium")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    command += ["--enable-logging=stderr", "--v=0"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S).group(1)
    assert title == "honeloom evaluate"
    assert 'class="main-svg"' in done.stdout  # our own script ran and drew the chart
    assert "CONSOLE" not in done.stderr or "Content Security Policy" not in done.stderr


def test_card_escapes_markdown_and_names_only_hub_ids(tmp_path):
    inputs = [
        ResolvedInput("model", "model", "org/base@main", (), "a" * 64, 1, revision="abc"),
        ResolvedInput("rows.0", "rows", "/home/me/[click](javascript:x)|<b>.jsonl", (), "b" * 64, 1),
    ]
    write_card(tmp_path, hostile_report(), inputs, "adapter")
    text = (tmp_path / "README.md").read_text()
    front, body = text.split("---\n")[1], text.split("---\n", 2)[2]
    assert "base_model:\n- org/base" in front or "base_model: [org/base]" in front
    assert "base_model_relation: adapter" in front
    assert "/home/me" not in front
    assert "<b>" not in body
    assert "<script>" not in body
    assert r"\[click\]" in body
