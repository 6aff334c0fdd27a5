"""`honeloom mix`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings
from honeloom.registry import load_target


def mix(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML: level, experts, base_model, router; or mergekit-moe's.")
    ],
    out: o.OutArgument = None,
    seed: o.SettledSeed = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="auto|bf16|fp16|fp32", help="Of the output; auto keeps the base's.  [default: auto]"
        ),
    ] = None,
    max_memory: o.MaxMemory = None,
    threads: o.Threads = None,
    device: o.SettledDevice = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
    calibrate: o.Calibrate = False,
) -> None:
    """Mix trained models into one mixture of experts: their MLPs, their layers, or whole models.

    Example: honeloom mix mix.yaml mixed
    """
    flags = {"seed": seed, "device": device, "dtype": dtype, "max_memory": max_memory, "threads": threads}
    given = {**load_target("honeloom.config.load:load_yaml")(config), **settings("mix", flags, None)}
    if set_:
        given = load_target("honeloom.config.load:apply_overrides")(given, set_)
    run_verb("mix", partial(honeloom.mix, config), given, out=choose_out(out, output_dir), overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run, calibrate=calibrate, push_to_hub=push_to_hub)  # fmt: skip
