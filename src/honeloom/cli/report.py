"""`honeloom report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honeloom.registry import load_target


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A result, or a folder that holds several.")],
) -> None:
    """Write report.html again (extra report), or index.html of a folder of results.

    Example: honeloom report run1
    """
    typer.echo(load_target("honeloom.stages.records:render_report")(run))
