"""`honeloom run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb
from honeloom.errors import ConfigError


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML with named stages; see `honeloom init`.")],
    out: o.OutArgument = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of stages that name none.  [default: the recipe's]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=C", help="A variable (model=X) or a stage's key (pick.keep=5%); repeatable."
        ),
    ] = None,
    withdraw: Annotated[
        list[str] | None,
        typer.Option("--withdraw", metavar="ID", help="A row that nothing may read; repeatable, beside the recipe's."),
    ] = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    json: o.Json = False,
    dry_run: o.DryRun = False,
    calibrate: o.Calibrate = False,
) -> None:
    """Run a recipe: every stage in order, finished ones reused, interrupted ones resumed.

    Example: honeloom run recipe.yaml --set model=org/model --output-dir run1
    """
    folder = choose_out(out, output_dir)
    if folder is None and not dry_run:
        raise ConfigError("run writes its result: give an output folder (--output-dir OUT)")

    def call(output_dir: Path, **options: Any) -> Any:
        return honeloom.run(output_dir=output_dir, **options)

    options = {"recipe": recipe, "set": set_ or [], "seed": seed, "withdraw": withdraw or []}
    run_verb("run", call, options, out=folder, overwrite=overwrite, resume=resume, as_json=json, dry_run=dry_run,
             calibrate=calibrate)  # fmt: skip
