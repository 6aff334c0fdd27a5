"""`honeloom extract-lora`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings


def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The tuned model: hub id, id@rev, path or lab:base.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was tuned from; the adapter is loaded on it.")],
    out: o.OutArgument = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", help="Columns per module at most.  [default: 16, or by --energy]"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", metavar="T", help="Share of the squared norm to keep in each module.  [default: no]"),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets", metavar="REGEX", help="Linear layers whose whole path matches.  [default: all-linear]"
        ),
    ] = None,
    seed: o.Seed = 0,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where to load the result.  [default: auto]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="auto|bf16|fp16|fp32", help="Of the factors; auto is fp32.  [default: auto]"),
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
    """Extract the low-rank difference of two models as an adapter: what tuning changed, in a small file.

    Example: honeloom extract-lora org/tuned org/model adapter --rank 32
    """
    given = {
        "tuned": model, "base": base, "rank": rank, "energy": energy, "targets": targets, "seed": seed,
        "device": device, "dtype": dtype,
    }  # fmt: skip

    def call(tuned: str, base: str, **options: Any) -> Any:
        return honeloom.extract_lora(tuned, base, **options)

    run_verb("extract-lora", call, settings("extract-lora", given, set_), out=choose_out(out, output_dir),
             overwrite=overwrite, resume=resume, as_json=json, dry_run=dry_run, calibrate=calibrate,
             push_to_hub=push_to_hub)  # fmt: skip
