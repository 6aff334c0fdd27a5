"""`honeloom federate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb, settings
from honeloom.registry import load_target


def federate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, id@rev, path or lab:base.")],
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FED.yaml", help="Clients or a partition, ranks, rounds, rule.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="inline|simulation|deployment",
            help="What carries the messages: this process, or Flower on this machine or others.  [default: inline]",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="R", help="Rounds of local tuning and aggregation.  [default: 3]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Every random choice follows from it.  [default: 0]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.  [default: auto]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="auto|bf16|fp16|fp32", help="Of the base's weights.  [default: auto]"),
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
    """Tune a model on rows that stay with their clients.

    Example: honeloom federate org/model --config fed.yaml --output-dir global
    """
    data: dict[str, Any] = load_target("honeloom.config.load:load_yaml")(config) if config else {}
    flags = {"model": model, "engine": engine, "rounds": rounds, "seed": seed, "device": device, "dtype": dtype}
    given = {**data, **settings("federate", flags, None)}
    if set_:
        given = load_target("honeloom.config.load:apply_overrides")(given, set_)

    def call(output_dir: Path, model: str, **options: Any) -> Any:
        return honeloom.federate(model, config, output_dir=output_dir, **options)

    run_verb("federate", call, given, out=output_dir, overwrite=overwrite, resume=resume, as_json=json,
             dry_run=dry_run, calibrate=calibrate, push_to_hub=push_to_hub)  # fmt: skip
