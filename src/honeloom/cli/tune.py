"""`honeloom tune`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb, settings

Method = Annotated[str | None, typer.Option("--method", metavar="lora|full", help="What is trained.  [default: lora]")]
Optimizer = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        metavar="adamw|sgd|mezo",
        help="What updates the weights; mezo with forward passes alone.  [default: adamw]",
    ),
]
Epochs = Annotated[float | None, typer.Option("--epochs", metavar="E", help="Passes over the rows.  [default: 1]")]
Rate = Annotated[
    str | None,
    typer.Option("--lr", metavar="X|auto", help="Learning rate; with mezo also auto.  [default: 2e-4 lora, 2e-5 full]"),
]
Accumulate = Annotated[
    int | None, typer.Option("--accumulate", metavar="N", help="Forward passes per optimizer step.  [default: 1]")
]
GroupByLength = Annotated[
    bool, typer.Option("--group-by-length", help="Batch rows of similar length: less padding, another order.")
]
Recompute = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Compute activations again: less memory, about a third slower."),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option("--report-to", metavar="NAME", help="trackio, wandb, mlflow or tensorboard; repeatable."),
]


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, id@rev, path or lab:base.")],
    rows: Annotated[list[str], typer.Argument(metavar="ROWS...", help="Path, glob, hub id or lab:pool|dev|test.")],
    method: Method = None,
    optimizer: Optimizer = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", help="Optimizer steps, instead of --epochs.")
    ] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="R", help="LoRA rank.  [default: 8]")] = None,
    batch_size: o.SmallBatchSize = None,
    accumulate: Accumulate = None,
    max_length: o.MaxLength = None,
    packing: Annotated[bool, typer.Option("--packing", help="Lay rows end to end instead of padding them.")] = False,
    group_by_length: GroupByLength = False,
    gradient_checkpointing: Recompute = False,
    report_to: ReportTo = None,
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
    calibrate: o.Calibrate = False,
) -> None:
    """Tune a model on rows: an adapter (default) or a full model out.

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
