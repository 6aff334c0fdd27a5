"""`honeloom drop`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings


def drop(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, id@rev, path or lab:base.")],
    out: o.OutArgument = None,
    attention: Annotated[
        int | None, typer.Option("--attention", metavar="N", help="Attentions to drop.  [default: 0]")
    ] = None,
    mlp: Annotated[int | None, typer.Option("--mlp", metavar="N", help="MLPs to drop.  [default: 0]")] = None,
    block: Annotated[
        int | None, typer.Option("--block", metavar="N", help="Whole blocks to drop.  [default: 0]")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration", metavar="ROWS", help="Rows on which importance is measured; repeatable.  [required]"
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="See `honeloom methods dropping`.  [default: cosine]")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="zero", help="How the result is written.  [default: zero]")
    ] = None,
    limit: o.Limit = None,
    split: o.Split = None,
    strict: o.Strict = False,
    max_bad: o.MaxBad = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Calibration rows at most.  [default: 256]")
    ] = None,
    batch_size: o.SmallBatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attn: o.Attn = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
) -> None:
    """Drop the least important attention, MLP or blocks: score, plan, write, verify.

    Example: honeloom drop org/model dropped --attention 8 --calibration c4.jsonl
    """
    given = {
        "model": model, "attention": attention, "mlp": mlp, "block": block, "calibration": calibration,
        "metric": metric, "profile": profile, "samples": samples, "limit": limit,
        "split": split, "strict": strict, "max_bad": max_bad, "batch_size": batch_size,
        "max_length": max_length, "seed": seed, "device": device, "dtype": dtype, "attn": attn,
    }  # fmt: skip
    run_verb("drop", honeloom.drop, settings("drop", given, set_), out=choose_out(out, output_dir), overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run, push_to_hub=push_to_hub)  # fmt: skip
