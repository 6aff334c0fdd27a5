"""`honeloom select`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb, settings

Target = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="ROWS", help="Rows like those the model is wanted for; may be repeated."),
]
Overlap = Annotated[
    str | None,
    typer.Option(
        "--overlap",
        metavar="refuse|leave_out",
        help="Rows that repeat a target row: stop, or leave them out.  [default: refuse]",
    ),
]


def select(
    rows: Annotated[list[str], typer.Argument(metavar="ROWS...", help="Path, glob, hub id or lab:pool|dev|test.")],
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="See `honeloom methods selection`.  [default: random]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Scores the rows, or is tuned to value them.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="10%|500|200000tok", help="Share, rows or tokens to keep.  [default: 10%]"),
    ] = None,
    target: Target = None,
    overlap: Overlap = None,
    budget: o.Budget = None,
    workers: o.Workers = None,
    ray: o.Ray = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            "--near-duplicates", metavar="J", help="Also reject rows this similar (Jaccard, 0-1).  [default: no]"
        ),
    ] = None,
    limit: o.Limit = None,
    split: o.Split = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    load_in: o.LoadIn = None,
    attn: o.Attn = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    strict: o.Strict = False,
    max_bad: o.MaxBad = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    json: o.Json = False,
    dry_run: o.DryRun = False,
) -> None:
    """Choose the rows worth training on: rows in, scores and a subset out.

    Example: honeloom select rows.jsonl --method shed --model org/model --target wanted.jsonl --output-dir picked
    """
    given = {
        "rows": rows, "method": method, "model": model, "keep": keep, "target": target or None,
        "overlap": overlap, "budget": budget, "workers": workers, "ray": ray, "near_duplicates": near_duplicates,
        "limit": limit, "split": split, "seed": seed, "device": device, "dtype": dtype,
        "load_in": load_in, "attn": attn, "batch_size": batch_size,
        "max_length": max_length, "strict": strict, "max_bad": max_bad,
    }  # fmt: skip
    run_verb("select", honeloom.select, settings("select", given, set_), out=output_dir, overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run)  # fmt: skip
