"""Flags that several commands share, so that each is spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Attn", "BatchSize", "Calibrate", "Device", "DryRun", "Dtype", "Json", "Limit", "LoadIn", "MaxBad", "MaxLength",
    "MaxMemory", "OutArgument", "OutputDir", "Overwrite", "PushToHub", "Resume", "Seed", "Set", "SettledDevice",
    "SettledDtype", "SettledSeed", "SmallBatchSize", "Split", "Strict", "Threads",
]  # fmt: skip

OutArgument = Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Folder for the result (or --output-dir).")]
OutputDir = Annotated[
    Path | None, typer.Option("--output-dir", "--output_dir", metavar="OUT", help="Folder for the result.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds once the new result is complete.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from an earlier honeloom result in OUT: reuse what matches.")
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Upload the verified result to org/name; a new one is private."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; load no weights, write nothing.")]
Calibrate = Annotated[
    bool,
    typer.Option("--calibrate", help="With --dry-run: count all tokens and time a few passes, for tokens and seconds."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Every random choice follows from it.")]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute; auto takes cuda, then mps."),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="auto|bf16|fp16|fp32", help="Type of the loaded weights; auto is bf16 on CUDA."),
]
LoadIn = Annotated[
    str | None,
    typer.Option("--load-in", metavar="4bit|8bit", help="Quantise the loaded weights (extra quant).  [default: no]"),
]
Attn = Annotated[
    str | None, typer.Option("--attn", metavar="sdpa|flash|eager", help="Attention kernel.  [default: the model's]")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Read only the first N rows.  [default: all]")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set any key of the settings; repeatable.")
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split", metavar="A-B", help="Only rows whose id's hash lies in this part of 0-1, as 0-0.8.  [default: all]"
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unusable row.")]
MaxBad = Annotated[
    float | None,
    typer.Option(
        "--max-bad", metavar="SHARE", help="Stop if more than this share of rows is unusable.  [default: 0.01]"
    ),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Rows per forward pass.  [default: 16]")
]
SmallBatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Rows per forward pass.  [default: 8]")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", help="Tokens per row.  [default: the model's limit, at most 2048]"),
]
Budget = Annotated[
    int | None,
    typer.Option("--budget", metavar="N", help="Most evaluations that are paid for.  [default: the method's]"),
]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="Processes that evaluate side by side.  [default: 1]")
]
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="local|ADDRESS", help="Evaluate on a Ray cluster.  [default: no]")
]
SettledSeed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Every random choice follows from it.  [default: 0]")
]
"""Of commands whose configuration file may hold the seed too; so are the next ones."""
SettledDevice = Annotated[
    str | None, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.  [default: auto]")
]
SettledDtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="auto|bf16|fp16|fp32", help="Type of the loaded weights.  [default: auto]"),
]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Memory at most, as 2GiB.  [default: no limit]")
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="Tensors at a time.  [default: one per core]")
]
