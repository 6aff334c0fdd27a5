"""`honeloom glue`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings
from honeloom.registry import load_target


def glue(
    zoo: Annotated[
        Path, typer.Argument(metavar="ZOO", help="YAML with models, base, search_rows, ...; or a folder of models.")
    ],
    out: o.OutArgument = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="clusters|search|merge", help="Stop there.  [default: all parts]")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="What they were tuned from.  [default: unknown]")
    ] = None,
    search_rows: Annotated[
        list[str] | None, typer.Option("--search-rows", metavar="ROWS", help="Rows that choose; repeatable.")
    ] = None,
    report_rows: Annotated[
        list[str] | None,
        typer.Option(
            "--report-rows", metavar="ROWS", help="Rows that report; without them, half of those that choose."
        ),
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", metavar="NAME", help="How weights are found.  [default: coefficient]")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="How candidates are merged.  [default: linear]")
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", metavar="N", help="Merges tried per cluster.  [default: the search's]")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", metavar="X", help="Least similarity of a family.  [default: 0.95]")
    ] = None,
    limit: o.Limit = None,
    strict: o.Strict = False,
    max_bad: o.MaxBad = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.SettledSeed = None,
    device: o.SettledDevice = None,
    dtype: o.SettledDtype = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
    calibrate: o.Calibrate = False,
) -> None:
    """Make one model of a zoo: cluster, search merges, merge, mix, verify, advise.

    Example: honeloom glue models glued --search-rows dev.jsonl --report-rows test.jsonl
    """
    given = settings("glue", {
        "only": only, "base": base, "search_rows": search_rows, "report_rows": report_rows, "search": search,
        "method": method, "budget": budget, "threshold": threshold, "limit": limit, "strict": strict or None,
        "max_bad": max_bad, "batch_size": batch_size, "max_length": max_length, "seed": seed, "device": device,
        "dtype": dtype,
    }, None)  # fmt: skip
    given = {**load_target("honeloom.zoo.reading:read_zoo")(zoo), **given}
    if set_:
        given = load_target("honeloom.config.load:apply_overrides")(given, set_)
    run_verb("glue", honeloom.glue, given, out=choose_out(out, output_dir), overwrite=overwrite, resume=resume,
             as_json=json, dry_run=dry_run, calibrate=calibrate, push_to_hub=push_to_hub)  # fmt: skip
