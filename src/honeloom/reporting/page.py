"""`report.html`: one self-contained page, inert whatever the rows and names hold."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from honeloom import __version__
from honeloom.reporting.panel import Panel
from honeloom.reporting.panels import PANELS
from honeloom.reporting.run_panels import headline_panel
from honeloom.runs.atomic import write_bytes
from honeloom.types.report import Report

__all__ = ["environment", "write_page"]


def environment() -> Environment:
    """The jinja2 environment of pages and cards: autoescaping, undefined names are errors."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    env = Environment(
        loader=loader,
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["number"] = _number
    env.filters["island"] = _island
    return env


def write_page(folder: Path, report: Report) -> Path | None:
    """Write `report.html` beside `report.json`; None where plotly is not installed (extra `report`).

    Parameters
    ----------
    folder : Path
        A stage's folder, or a run's with its stages in `stages/`.
    report : Report
        What it says.
    """
    library = _plotly()
    if library is None:
        return None
    sections = list(_sections(folder, report))
    draw = (Path(__file__).parent / "templates" / "draw.js").read_text()
    page = (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            version=__version__,
            sections=sections,
            library=library if any(p.figure for _, _, panels in sections for p in panels) else "",
            draw=draw,
            policy=_policy(library, draw),
        )
    )
    path = folder / "report.html"
    write_bytes(path, page.encode())
    return path


def _sections(folder: Path, report: Report) -> Iterator[tuple[str, Report, list[Panel]]]:
    """(title, report, panels) of the page: the run's headline and then every stage, or the stage alone."""
    if report.verb != "run":
        yield report.verb, report, _panels(folder, report)
        return
    stages = []
    for stage in report.details["stages"]:
        place = folder / "stages" / Path(stage["out"]).name
        stages.append((stage, place, Report.from_json(json.loads((place / "report.json").read_bytes()))))
    headline = headline_panel([(s["name"], r) for s, _, r in stages])
    yield "before and after", report, [headline] if headline else []
    for stage, place, inner in stages:
        yield f"{stage['name']}: {stage['verb']}", inner, _panels(place, inner)


def _panels(folder: Path, report: Report) -> list[Panel]:
    return [p for make in PANELS[report.verb] if (p := make(folder, report)) is not None]


def _plotly() -> str | None:
    spec = importlib.util.find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        return None
    return (Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js").read_text()


def _policy(*scripts: str) -> str:
    """A content security policy that runs these scripts and nothing else, and loads nothing."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{d}'" for d in digests)
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _island(value: Any) -> Any:
    """JSON for a <script type="application/json"> element: "<" cannot end it, separators cannot break it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
