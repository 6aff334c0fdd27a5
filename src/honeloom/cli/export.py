"""`honeloom export`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, id@rev, path or lab:base.")],
    out: o.OutArgument = None,
    format: Annotated[
        str | None, typer.Option("--format", metavar="gguf", help="Of llama.cpp and its front-ends.  [default: gguf]")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option("--quant", metavar="f16|q8_0", help="Type of matrices; vectors stay float32.  [default: f16]"),
    ] = None,
    seed: o.Seed = 0,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where the source runs.  [default: auto]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="auto|bf16|fp16|fp32",
            help="Of the source that is compared; auto is fp32.  [default: auto]",
        ),
    ] = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
) -> None:
    """Export a model as one GGUF file for llama.cpp, checked against the source.

    Example: honeloom export org/model served --quant q8_0
    """
    given = {"model": model, "format": format, "quant": quant, "seed": seed, "device": device, "dtype": dtype}
    run_verb("export", honeloom.export, settings("export", given, set_), out=choose_out(out, output_dir),
             overwrite=overwrite, resume=resume, as_json=json, dry_run=dry_run, push_to_hub=push_to_hub)  # fmt: skip
