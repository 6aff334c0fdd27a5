"""`honeloom report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honeloom.registry import load_target


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that a honeloom command wrote.")],
) -> None:
    """Write report.html again from report.json: one self-contained page (extra report).

    Example: honeloom report run1
    """
    typer.echo(load_target("honeloom.stages.records:render_report")(run))
