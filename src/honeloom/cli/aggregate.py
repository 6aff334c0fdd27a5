"""`honeloom aggregate`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb, settings


def aggregate(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="PEFT LoRA adapter folders or hub ids of one base model.")
    ],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="One per adapter, such as its rows.  [default: equal]"),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale", metavar="X", help="Multiplier on the combined update; K adapters and K: sum.  [default: 1.0]"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="See `honeloom methods aggregation`.  [default: svd]"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", help="Of methods svd and flexlora.  [default: the largest adapter's]"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", metavar="T", help="Of method svd: share of the squared norm to keep.  [default: no]"),
    ] = None,
    into_base: Annotated[
        str | None,
        typer.Option("--into-base", metavar="MODEL", help="Write this model with the update added.  [default: no]"),
    ] = None,
    seed: o.Seed = 0,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where to check a merged model.  [default: auto]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="auto|bf16|fp16|fp32", help="Of the output: fp32, or the merged base's.  [default: auto]"
        ),
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
    """Aggregate LoRA adapters of one base: one adapter out, or the base with their sum added.

    Example: honeloom aggregate site-a site-b --weights 50,30 --method flora --output-dir global
    """
    given = {
        "adapters": adapters, "weights": weights, "scale": scale, "method": method, "rank": rank, "energy": energy,
        "into_base": into_base, "seed": seed, "device": device, "dtype": dtype,
    }  # fmt: skip
    run_verb("aggregate", honeloom.aggregate, settings("aggregate", given, set_), out=output_dir, overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run, calibrate=calibrate, push_to_hub=push_to_hub)  # fmt: skip
