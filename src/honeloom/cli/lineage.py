"""`honeloom lineage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honeloom.cli import options as o
from honeloom.cli.shared import print_json
from honeloom.registry import load_target


def lineage(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that a honeloom command wrote.")],
    row: Annotated[str | None, typer.Option("--row", metavar="ID", help="Which stages did this row touch?")] = None,
    json: o.Json = False,
) -> None:
    """Say what a result was made of, or which stages a row touched.

    Example: honeloom lineage run1 --row alpaca-00017
    """
    trace = load_target("honeloom.stages.records:trace")(run, row)
    if json:
        print_json(trace)
        return
    for stage in trace["stages"]:
        typer.echo(f"{stage['stage']} ({stage['verb']}) {stage['sha256'][:16]}")
        for source in stage["reads"]:
            typer.echo(f"  {source['place']}: {source['value']} {source['sha256'][:16]}")
        if row is not None:
            typer.echo(f"  row {row}: {stage['row']}")
    typer.echo(run)
