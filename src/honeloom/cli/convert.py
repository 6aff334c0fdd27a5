"""`honeloom convert`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder whose weights are pickled (.bin, .pt, .pth).")],
    out: o.OutArgument = None,
    seed: o.Seed = 0,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where to load the result.  [default: auto]"),
    ] = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
    calibrate: o.Calibrate = False,
) -> None:
    """Convert pickled weights to safetensors without running what a pickle may hold: the same tensors, checked.

    Example: honeloom convert old-model model
    """
    given = {"source": model, "seed": seed, "device": device}

    def call(source: str, **options: Any) -> Any:
        return honeloom.convert(source, **options)

    run_verb("convert", call, settings("convert", given, set_), out=choose_out(out, output_dir), overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run, calibrate=calibrate, push_to_hub=push_to_hub)  # fmt: skip
