"""The page in Chromium, from file://: quiet, inert, legible in both schemes, narrow enough for a phone, printable."""

import shutil

import pytest
from chromium_pipe import Chromium
from domain_folder import CURVE, SWEEP, write_domains
from hostile_texts import HOSTILE, hostile_report
from valued_folder import write_valued

import honeloom
from honeloom.reporting.page import write_page

pytestmark = pytest.mark.browser

RECIPE = """
version: 1
description: A short run of every verb that draws.
stages:
  before: {evaluate: {model: lab:base, rows: lab:test, limit: 60}}
  pick: {select: {model: lab:base, rows: lab:dev, method: {type: length}, keep: 50%}}
  tuned: {tune: {model: lab:base, rows: $pick, max_steps: 3}}
  merged: {merge: {base_model: lab:base, models: [{model: $tuned}], method: {type: task_arithmetic}}}
  shallow: {drop: {model: $merged, attention: 1, calibration: lab:dev, samples: 8}}
  after: {evaluate: {model: $shallow, rows: lab:test, limit: 60, against: $before}}
"""
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark"), (320, "light")]


@pytest.fixture(scope="module")
def browser(require, tmp_path_factory):
    program = require(shutil.which("chromium") or shutil.which("chromium-browser"), "Chromium")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, hostile_selection):
    folder = tmp_path_factory.mktemp("pages")
    (folder / "hostile").mkdir()
    (folder / "valued").mkdir()
    (folder / "domains").mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    honeloom.run(folder / "recipe.yaml", output_dir=folder / "run")
    return {
        "run": folder / "run" / "report.html",
        "stage": folder / "run" / "stages" / "6-after" / "report.html",
        "rows": hostile_selection / "report.html",
        "hostile": write_page(folder / "hostile", hostile_report()),
        "valued": write_page(folder / "valued", write_valued(folder / "valued")),
        "domains": write_page(folder / "domains", _hostile_domains(folder / "domains")),
    }


def _hostile_domains(folder):
    """Twenty domains and thirty labels whose names are attempts."""
    names = [f"{text[:60]} {i}" for i, text in enumerate(HOSTILE * 2)]
    labels = [f"{text[:60]} {i}" for i, text in enumerate(HOSTILE * 3)]
    return write_domains(folder, names, labels, band_curve=CURVE, sweep=SWEEP)


NAMES = ["run", "stage", "rows", "hostile", "valued", "domains"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_page_is_quiet_loads_nothing_and_fits(browser, pages, name, width, scheme):
    url = pages[name].as_uri()
    browser.open(url, width, scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.settle()
    assert browser.complaints() == []
    # Heat maps are pictures that the page itself paints, as data.
    assert [r for r in browser.requests() if not r.startswith("data:image/png;")] == [url]
    assert browser.run("document.querySelectorAll('.main-svg').length") > 0
    assert browser.run("document.documentElement.scrollWidth") <= width
    # Nothing reaches beyond the window but what lies in a box that scrolls by itself.
    over = f"""[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, pre, .skip, svg, .modebar'))
      .filter(e => e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 120))"""
    assert browser.run(over) == []


@pytest.mark.parametrize("name", ["rows", "hostile"])
def test_hostile_text_is_only_text(browser, pages, name):
    browser.open(pages[name].as_uri())
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.title").startswith("honeloom ")
    assert browser.run("[...document.querySelectorAll('a, area, form, iframe, img, object, embed')].length") == (
        browser.run("document.querySelectorAll('a[href^=\"#\"]').length")
    )
    assert browser.run("document.querySelectorAll('svg a').length") == 0
    assert browser.run("document.body.innerText.length") < 60_000
    # A chart writes the name itself, not what its markup would mean.
    labels = browser.run("[...document.querySelectorAll('.ytick text')].map(t => t.textContent)")
    assert any(label.startswith("<img src=x") for label in labels)
    assert any(label.startswith("<a href=") for label in labels)


def test_names_of_domains_are_only_text_when_pointed_at(browser, pages):
    browser.open(pages["domains"].as_uri())
    told = browser.run("""[...document.querySelectorAll('.chart')].flatMap(chart => chart.data.flatMap((trace, i) => {
      const z = trace.type === 'heatmap' && trace.z.flatMap((r, y) => r.flatMap((v, x) => v === null ? [] : [[y, x]]));
      const at = z ? z[0] : 0;
      Plotly.Fx.hover(chart, [{curveNumber: i, pointNumber: at}]);
      return [...chart.querySelectorAll('.hovertext')].map(t => t.textContent);
    }))""")
    assert any("<script>" in t or "<img" in t or "<a href" in t for t in told)
    assert browser.run("document.querySelectorAll('svg a, svg img').length") == 0
    assert browser.run("document.title").startswith("honeloom ")


def test_policy_stops_a_script_that_got_into_the_page(browser, pages):
    browser.open(pages["hostile"].as_uri())
    browser.run("""{const s = document.createElement('script'); s.textContent = 'window.ran = 1';
      document.body.append(s); const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i);}""")
    browser.settle()
    assert browser.run("window.ran === undefined")
    assert len(browser.complaints()) >= 2


def contrast(one, other):
    """WCAG contrast of two CSS rgb() colours."""

    def luminance(colour):
        parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


LOOK = """(() => { const style = (q, p) => getComputedStyle(document.querySelector(q))[p]; return {
  paper: style('body', 'backgroundColor'), text: style('body', 'color'), quiet: style('.quiet', 'color'),
  link: style('nav a', 'color'), tick: style('.xtick text', 'fill'), ok: style('.ok', 'color'),
  marks: [...new Set([...document.querySelectorAll('.scatterlayer .point, .barlayer .point path')]
    .map(p => getComputedStyle(p).fill))],
}; })()"""


def test_both_schemes_are_legible_and_charts_follow_a_change(browser, pages):
    browser.open(pages["run"].as_uri(), scheme="light")
    light = browser.run(LOOK)
    browser.media("dark")  # the reader's system switches; the page is not loaded again
    browser.settle()
    dark = browser.run(LOOK)
    for key in ("paper", "text", "quiet", "link", "tick", "ok"):
        assert light[key] != dark[key]
    assert set(light["marks"]).isdisjoint(dark["marks"])
    for look in (light, dark):
        for key in ("text", "quiet", "link", "tick", "ok"):
            assert contrast(look[key], look["paper"]) >= 4.5, key
        series = [m for m in look["marks"] if m.startswith("rgb(")]
        assert len(series) >= 3
        # WCAG 1.4.11; the neutral grey of what was left out need not stand out.
        assert sum(contrast(m, look["paper"]) >= 3 for m in series) >= len(series) - 1
    assert browser.complaints() == []


def test_every_chart_has_a_text_and_a_table_twin(browser, pages):
    browser.open(pages["run"].as_uri())
    charts = browser.run("""[...document.querySelectorAll('[data-figure]')].map(c => ({
      role: c.getAttribute('role'), label: c.getAttribute('aria-label'),
      rows: c.parentElement.querySelectorAll('details table tbody tr').length}))""")
    assert len(charts) == 11
    assert all(c["role"] == "img" and len(c["label"]) > 40 and c["rows"] >= 1 for c in charts)  # one drop has one


def test_keyboard_reaches_everything(browser, pages):
    browser.open(pages["run"].as_uri())
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    targets = browser.run("""[...document.querySelectorAll('nav a')].map(
      a => document.getElementById(a.hash.slice(1))?.querySelector('h2') !== null)""")
    assert len(targets) >= 10
    assert all(targets)
    folded = browser.run("document.querySelectorAll('summary').length")
    reached = set()
    for _ in range(80):  # more than there is to reach: it goes round
        browser.press("Tab", 9)
        reached.add(browser.run("[...document.querySelectorAll('summary')].indexOf(document.activeElement)"))
    assert reached == {-1, *range(folded)}
    browser.run("document.querySelector('summary').focus()")
    browser.press(" ", 32)
    browser.until("document.querySelector('details').open")


def test_print_opens_tables_and_draws_in_light_colours(browser, pages):
    browser.open(pages["run"].as_uri(), scheme="dark")
    dark = browser.run(LOOK)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.media("dark", "print")
    browser.settle()
    paper = browser.run(LOOK)
    assert contrast(paper["tick"], "rgb(255, 255, 255)") >= 4.5
    assert set(paper["marks"]).isdisjoint(dark["marks"])
    assert browser.run(
        "[...document.querySelectorAll('details table')].every(t => t.getBoundingClientRect().height > 20)"
    )
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.media("dark")
    browser.run("dispatchEvent(new Event('afterprint'))")
    browser.settle()
    assert browser.run(LOOK) == dark
    assert browser.pdf().startswith(b"%PDF")
