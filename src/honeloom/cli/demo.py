"""`honeloom demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb
from honeloom.config.shipped import shipped_path
from honeloom.errors import MissingExtraError
from honeloom.registry import load_target


def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "--output_dir", metavar="OUT", help="Folder for the run.")
    ] = Path("demo-run"),
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Run the whole loop on the built-in lab, offline: select, tune, merge, drop, evaluate.

    Example: honeloom demo
    """
    if load_target("honeloom.runs.environment:installed_version")("peft") is None:
        raise MissingExtraError("the demo tunes, and peft is not installed: pip install 'honeloom[tune]'")
    recipe = shipped_path("demo")

    def call(output_dir: Path, **options: Any) -> Any:
        return honeloom.run(output_dir=output_dir, **options)

    run_verb(
        "run", call, {"recipe": recipe}, out=output_dir, overwrite=overwrite, resume=False, as_json=json, dry_run=False
    )
