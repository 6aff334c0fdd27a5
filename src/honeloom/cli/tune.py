"""`honeloom tune`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb, settings


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, id@rev, path or lab:base.")],
    rows: Annotated[list[str], typer.Argument(metavar="ROWS...", help="Path, glob, hub id or lab:pool|dev|test.")],
    method: Annotated[str | None, typer.Option("--method", metavar="lora|full", help="What is trained [lora].")] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", metavar="adamw|sgd", help="[adamw]")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", metavar="E", help="Passes over the rows [1].")] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate [2e-4 lora, 2e-5 full].")] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="R", help="LoRA rank [8].")] = None,
    batch_size: o.BatchSize = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", metavar="N", help="Forward passes per optimizer step [1].")
    ] = None,
    max_length: o.MaxLength = None,
    packing: Annotated[bool, typer.Option("--packing", help="Lay rows end to end instead of padding them.")] = False,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batch rows of similar length: less padding, another order.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about 30% slower.")
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", metavar="TRACKER", help="trackio, wandb, mlflow or tensorboard (repeatable)."),
    ] = None,
    limit: o.Limit = None,
    split: o.Split = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    load_in: o.LoadIn = None,
    attn: o.Attn = None,
    strict: o.Strict = False,
    max_bad: o.MaxBad = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="With --dry-run: read the rows and time a few steps, for tokens and seconds."),
    ] = False,
) -> None:
    """Tune a model on rows on one machine: an adapter (default) or a full model out.

    Example: honeloom tune org/model rows.jsonl --rank 16 --epochs 3 --output-dir tuned
    """
    given = {
        "model": model, "rows": rows, "method": method, "rank": rank, "optimizer": optimizer,
        "max_steps": max_steps, "epochs": epochs, "lr": lr, "batch_size": batch_size, "max_length": max_length,
        "accumulate": accumulate, "packing": packing, "group_by_length": group_by_length,
        "gradient_checkpointing": gradient_checkpointing, "report_to": report_to,
        "limit": limit, "split": split, "seed": seed, "device": device, "dtype": dtype,
        "load_in": load_in, "attn": attn, "strict": strict,
        "max_bad": max_bad,
    }  # fmt: skip
    run_verb("tune", honeloom.tune, settings("tune", given, set_), out=output_dir, overwrite=overwrite, resume=resume,
             as_json=json, dry_run=dry_run, push_to_hub=push_to_hub, calibrate=calibrate)  # fmt: skip
