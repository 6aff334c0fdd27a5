"""`report.html`: one self-contained page, inert whatever the rows and names hold."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from honeloom import __version__
from honeloom.reporting import text
from honeloom.reporting.lineage_graph import lineage_graph
from honeloom.reporting.panels import PANELS
from honeloom.reporting.parts import WARNINGS, overall_verdict, read_parts, warnings_of
from honeloom.reporting.records import read_records
from honeloom.reporting.run_panels import ablation_panel, headline_panel, sweep_panel
from honeloom.runs.atomic import write_bytes
from honeloom.types.report import Report

__all__ = ["environment", "policy", "style", "write_page"]

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> Environment:
    """The jinja2 environment of pages and cards: autoescaping, undefined names are errors."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("clip", "code", "number", "plural", "seconds", "size"):
        env.filters[name] = getattr(text, name)
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
    parts = read_parts(folder, report)
    panels = {
        p.anchor: [panel for make in PANELS.get(p.report.verb, ()) if (panel := make(p.folder, p.report))]
        for p in parts
    }
    is_run = report.verb == "run"
    stages = [(p.title, p.report) for p in parts] if is_run else []
    headline, points = headline_panel(stages, report), sweep_panel(report) or ablation_panel(report)
    charts = [panel for some in panels.values() for panel in some] + [p for p in (headline, points) if p]
    library = library if any(p.figure for p in charts) else ""
    draw = (TEMPLATES / "draw.js").read_text(encoding="utf-8") if library else ""
    page = (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            version=__version__,
            verdict=overall_verdict(report, parts),
            parts=parts,
            panels=panels,
            is_run=is_run,
            warned=warnings_of(report),
            most_warnings=WARNINGS,
            headline=headline,
            points=points,
            graph=lineage_graph(folder, report),
            records=read_records(folder, report, stages),
            style=style(),
            library=library,
            draw=draw,
            policy=policy(library, draw),
        )
    )
    path = folder / "report.html"
    write_bytes(path, page.encode())
    return path


def _plotly() -> str | None:
    spec = importlib.util.find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        return None
    return (Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def style() -> str:
    """The style sheet of every page."""
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")


def policy(*scripts: str) -> str:
    """A content security policy that runs these scripts and nothing else, and loads nothing."""
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts if s]
    allowed = " ".join(f"'sha256-{d}'" for d in digests) or "'none'"
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


def _island(value: Any) -> Any:
    """JSON for a <script type="application/json"> element: "<" cannot end it, separators cannot break it."""
    document = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(document.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
