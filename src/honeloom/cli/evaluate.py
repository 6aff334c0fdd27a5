"""`honeloom evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb, settings


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, id@rev, path or lab:base.")],
    rows: Annotated[
        list[str] | None, typer.Option("--rows", metavar="ROWS", help="Rows to measure on; repeatable.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="T", help="lm-eval tasks; repeatable, or a,b (extra lm-eval)."),
    ] = None,
    task_path: Annotated[
        str | None, typer.Option("--task-path", metavar="DIR", help="Your own lm-eval task files, for --tasks.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL|OUT",
            help="Another model, or an earlier evaluation, to compare with row by row.",
        ),
    ] = None,
    train_rows: Annotated[
        list[str] | None,
        typer.Option("--train-rows", metavar="ROWS", help="Training rows, for the overlap check; repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Read only the first N rows (N examples of each task).")
    ] = None,
    split: o.Split = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
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
    json: o.Json = False,
    dry_run: o.DryRun = False,
    calibrate: o.Calibrate = False,
) -> None:
    """Measure a model: per-domain loss, multiple choice by likelihood, lm-eval tasks.

    Example: honeloom evaluate tuned --rows test.jsonl --against org/model
    """
    given = {
        "model": model, "rows": rows, "tasks": [t for item in tasks or [] for t in item.split(",")],
        "task_path": task_path, "against": against, "train_rows": train_rows, "limit": limit, "split": split,
        "batch_size": batch_size, "max_length": max_length, "seed": seed, "device": device, "dtype": dtype,
        "load_in": load_in, "attn": attn,
        "strict": strict, "max_bad": max_bad,
    }  # fmt: skip
    run_verb("evaluate", honeloom.evaluate, settings("evaluate", given, set_), out=output_dir, overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run, calibrate=calibrate)  # fmt: skip
