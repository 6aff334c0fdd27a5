"""`index.html`: the results of a folder in one table, each with its verdict and a link."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from honeloom import __version__
from honeloom.errors import OutputExistsError
from honeloom.reporting.page import environment, policy, style
from honeloom.reporting.parts import overall_verdict, read_parts
from honeloom.reporting.verdict import Figure
from honeloom.runs.atomic import write_bytes
from honeloom.types.report import Report

__all__ = ["INDEX", "write_index"]

INDEX = "index.html"
_MARK = '<meta name="generator" content="honeloom">'


@dataclass(frozen=True, slots=True)
class Line:
    """One result: name, link, verb, when it was written, what came of it, and whether its claims held."""

    name: str
    link: str
    verb: str
    when: str
    sentence: str
    figure: Figure | None
    held: int
    claims: int
    status: str


def write_index(folder: Path, results: Sequence[tuple[Path, Report]], unfinished: Sequence[Path]) -> Path:
    """Write the page of a folder of results.

    Parameters
    ----------
    folder : Path
        Where `index.html` goes.
    results : sequence of (Path, Report)
        Finished results below it.
    unfinished : sequence of Path
        Folders of attempts that were interrupted.

    Raises
    ------
    OutputExistsError
        There is an `index.html` that honeloom did not write.
    """
    path = folder / INDEX
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise OutputExistsError(f"{path} exists, and honeloom did not write it; move it away first")
    text = style()
    page = (
        environment()
        .get_template("index.html")
        .render(
            folder=folder.name,
            lines=[_line(folder, place, report) for place, report in results],
            unfinished=[p.relative_to(folder).as_posix() for p in unfinished],
            version=__version__,
            mark=_MARK,
            style=text,
            policy=policy(),
        )
    )
    write_bytes(path, page.encode())
    return path


def _line(folder: Path, place: Path, report: Report) -> Line:
    verdict = overall_verdict(report, read_parts(place, report))
    target = place / "report.html" if (place / "report.html").is_file() else place / "README.md"
    written = datetime.fromtimestamp((place / "manifest.json").stat().st_mtime, UTC)
    return Line(
        name=place.relative_to(folder).as_posix(),
        link=quote(os.path.relpath(target, folder).replace(os.sep, "/")),
        verb=report.verb,
        when=written.strftime("%Y-%m-%d %H:%M"),
        sentence=verdict.sentence,
        figure=verdict.figure,
        held=sum(check.passed for check in report.verification),
        claims=len(report.verification),
        status=report.status,
    )
