"""`honeloom select`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import run_verb, settings
from honeloom.errors import ConfigError

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

Axis = Annotated[
    str | None, typer.Option("--axis", metavar="inter|intra", help="Of method band.  [default: inter; search: both]")
]
Band = Annotated[
    str | None,
    typer.Option("--band", metavar="LOW-HIGH|search", help="Of method band: percentiles to keep.  [default: 80-100]"),
]
Rounds = Annotated[
    int | None,
    typer.Option("--rounds", metavar="R", help="Of method daar: tune on each choice, probe again.  [default: 1]"),
]
MustKeep = Annotated[
    str | None,
    typer.Option("--must-keep", metavar="FILE", help="Rows, or .txt of ids: kept whatever their score; they count."),
]
MustDrop = Annotated[
    str | None, typer.Option("--must-drop", metavar="FILE", help="Rows, or .txt of ids, that are left out.")
]
Quota = Annotated[
    list[str] | None,
    typer.Option("--quota", metavar="GROUP=20%", help="Share of what is kept that a group gets; may be repeated."),
]
QuotaBy = Annotated[
    str | None,
    typer.Option("--quota-by", metavar="domain|source|cluster", help="What a group of --quota is.  [default: domain]"),
]


def quotas(given: list[str] | None) -> dict[str, str] | None:
    """Settings from GROUP=SHARE; the last `=` counts, for a group's name may have one."""
    found: dict[str, str] = {}
    for text in given or ():
        name, sign, share = text.rpartition("=")
        if not sign or not name:
            raise ConfigError(f"--quota {text!r}: use GROUP=SHARE, like code=20%")
        if name in found:
            raise ConfigError(f"--quota {name!r} is given twice; give it once")
        found[name] = share
    return found or None


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
    axis: Axis = None,
    band: Band = None,
    rounds: Rounds = None,
    must_keep: MustKeep = None,
    must_drop: MustDrop = None,
    quota: Quota = None,
    quota_by: QuotaBy = None,
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
    calibrate: o.Calibrate = False,
) -> None:
    """Choose the rows worth training on: rows in, scores and a subset out.

    Example: honeloom select rows.jsonl --method shed --model org/model --target wanted.jsonl --output-dir picked
    """
    given = {
        "rows": rows, "method": method, "model": model, "keep": keep, "axis": axis, "band": band, "rounds": rounds,
        "must_keep": must_keep, "must_drop": must_drop, "quota": quotas(quota), "quota_by": quota_by,
        "target": target or None, "overlap": overlap, "budget": budget, "workers": workers, "ray": ray,
        "near_duplicates": near_duplicates, "limit": limit, "split": split, "seed": seed, "device": device,
        "dtype": dtype, "load_in": load_in, "attn": attn, "batch_size": batch_size, "max_length": max_length,
        "strict": strict, "max_bad": max_bad,
    }  # fmt: skip
    run_verb("select", honeloom.select, settings("select", given, set_), out=output_dir, overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run, calibrate=calibrate)  # fmt: skip
