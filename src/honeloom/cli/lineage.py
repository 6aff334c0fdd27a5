"""`honeloom lineage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from honeloom.cli import options as o
from honeloom.cli.shared import print_json
from honeloom.registry import load_target


def lineage(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, one result, or a folder that holds several.")],
    row: Annotated[
        str | None, typer.Option("--row", metavar="ID", help="What did this row touch?  [default: no row]")
    ] = None,
    artefact: Annotated[
        str | None,
        typer.Option(
            "--artefact", metavar="PATH", help="What was made from this stage, model or file?  [default: none]"
        ),
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option("--parent", metavar="MODEL", help="What was made from this model?  [default: no model]"),
    ] = None,
    client: Annotated[
        str | None, typer.Option("--client", metavar="ID", help="What did this client touch?  [default: no client]")
    ] = None,
    json: o.Json = False,
) -> None:
    """Say what results were made of, and what one row, model or client touched.

    Example: honeloom lineage run1 --row alpaca-00017
    """
    trace = load_target("honeloom.stages.lineage:trace")
    found = trace(run, row, artefact=artefact, parent=parent, client=client)
    if json:
        print_json(found)
        return
    kind, what = next(((k, found[k]) for k in ("row", "artefact", "parent", "client") if found[k]), ("", ""))
    for stage in [*found["stages"], *found.get("outside", ())]:
        typer.echo(f"{stage['stage']} ({stage['verb']}) {stage['sha256'][:16]}")
        for source in stage["reads"]:
            typer.echo(f"  {source['place']}: {source['value']} {source['sha256'][:16]}")
        if kind:
            typer.echo(f"  {kind} {what}: {stage['touched']}")
    if kind:
        _tell(found)
    typer.echo(run)


def _tell(found: dict[str, Any]) -> None:
    """What to make again."""
    if found.get("made_from"):
        typer.echo(f"made from: {', '.join(found['made_from'])}")
    again = found["rebuild"]
    typer.echo(f"to make again without it: {', '.join(again) or 'nothing'}")
    for command in found["commands"]:
        typer.echo(f"  {command}")
