"""`honeloom verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import print_json, terminal


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Any folder that a honeloom command wrote.")],
    json: o.Json = False,
) -> None:
    """Check a result again: every file's size and hash, and the structure of weights; any problem exits with 3.

    Example: honeloom verify run1
    """
    report = honeloom.verify(path)
    if json:
        print_json(report.to_json())
    else:
        console = terminal(False)
        for p in report.details["problems"]:
            told = p["expected"] is not None and p["found"] is not None
            found = f" (expected {p['expected']}, found {p['found']})" if told else ""
            console.say(f"{p['file']}: {p['problem']}{found}")
        console.say(f"{report.details['files']} files checked, {len(report.details['problems'])} problems")
        typer.echo(path)
    if report.status != "ok":
        raise typer.Exit(3)
