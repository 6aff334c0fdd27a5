"""`honeloom drop`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings

_Count = int | None
_Rows = list[str] | None
_Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, id@rev, path or lab:base.")]
_Attention = Annotated[_Count, typer.Option("--attention", metavar="N", help="Attentions to drop.  [default: 0]")]
_Mlp = Annotated[_Count, typer.Option("--mlp", metavar="N", help="MLPs to drop.  [default: 0]")]
_Block = Annotated[_Count, typer.Option("--block", metavar="N", help="Whole blocks to drop.  [default: 0]")]
_Joint = Annotated[
    _Count,
    typer.Option("--joint", metavar="N", help="Attentions and MLPs to drop, by one ranking of both.  [default: 0]"),
]
_Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="KEY=VALUE",
        help="Limit of the result, as params=75%: params, kv_bytes_per_token, flops, loss_increase; repeatable.",
    ),
]
_Calibration = Annotated[
    _Rows,
    typer.Option("--calibration", metavar="ROWS", help="Rows on which importance is measured; repeatable.  [required]"),
]
_Metric = Annotated[
    str | None, typer.Option("--metric", metavar="NAME", help="See `honeloom methods dropping`.  [default: cosine]")
]
_Profile = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="zero|native|dropped|decilm|gguf", help="How the result is written.  [default: zero]"
    ),
]
_Choice = Annotated[
    str | None,
    typer.Option("--choice", metavar="one_shot|iterative|greedy", help="How drops are found.  [default: one_shot]"),
]
_Native = Annotated[
    bool, typer.Option("--native", help="Choose halves that leave whole blocks, which any runtime loads.")
]
_Consecutive = Annotated[bool, typer.Option("--consecutive", help="Drop blocks as one run of neighbours.")]
_First = Annotated[
    _Count, typer.Option("--protect-first", metavar="N", help="Layers at the start that stay.  [default: 0]")
]
_Last = Annotated[
    _Count, typer.Option("--protect-last", metavar="N", help="Layers at the end that stay.  [default: 0]")
]
_Scores = Annotated[
    str | None, typer.Option("--scores", metavar="FILE", help="scores.json of an earlier drop, in place of measuring.")
]
_Only = Annotated[str | None, typer.Option("--only", metavar="scores", help="Measure importances and drop nothing.")]
_Heal = Annotated[
    _Rows, typer.Option("--heal", metavar="ROWS", help="Tune the dropped model on these rows with LoRA; repeatable.")
]
_HealSteps = Annotated[_Count, typer.Option("--heal-steps", metavar="N", help="Steps of healing.  [default: 200]")]
_HealRank = Annotated[
    _Count, typer.Option("--heal-rank", metavar="R", help="Rank of healing's adapters.  [default: 16]")
]
_Affine = Annotated[
    bool, typer.Option("--affine", help="Scale the half behind every gap by least squares, without training.")
]
_OnNan = Annotated[
    str | None,
    typer.Option(
        "--on-nan", metavar="stop|skip", help="When scoring gives NaN: stop, or leave such rows out.  [default: stop]"
    ),
]
_Samples = Annotated[_Count, typer.Option("--samples", metavar="N", help="Calibration rows at most.  [default: 256]")]


def drop(
    model: _Model,
    out: o.OutArgument = None,
    attention: _Attention = None,
    mlp: _Mlp = None,
    block: _Block = None,
    joint: _Joint = None,
    budget: _Budget = None,
    calibration: _Calibration = None,
    metric: _Metric = None,
    profile: _Profile = None,
    choice: _Choice = None,
    native: _Native = False,
    consecutive: _Consecutive = False,
    protect_first: _First = None,
    protect_last: _Last = None,
    scores: _Scores = None,
    only: _Only = None,
    heal: _Heal = None,
    heal_steps: _HealSteps = None,
    heal_rank: _HealRank = None,
    affine: _Affine = False,
    on_nan: _OnNan = None,
    limit: o.Limit = None,
    split: o.Split = None,
    strict: o.Strict = False,
    max_bad: o.MaxBad = None,
    samples: _Samples = None,
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
    calibrate: o.Calibrate = False,
) -> None:
    """Drop the least important attention, MLP or blocks: score, choose, heal, write, verify.

    Example: honeloom drop org/model dropped --attention 8 --calibration c4.jsonl --profile dropped
    """
    given = {
        "model": model, "attention": attention, "mlp": mlp, "block": block, "joint": joint, "budget": budget,
        "calibration": calibration, "metric": metric, "profile": profile, "choice": choice, "native": native,
        "consecutive": consecutive, "protect_first": protect_first, "protect_last": protect_last, "scores": scores,
        "only": only, "heal": heal, "heal_steps": heal_steps, "heal_rank": heal_rank, "affine": affine,
        "samples": samples, "limit": limit, "split": split, "strict": strict, "max_bad": max_bad,
        "batch_size": batch_size, "max_length": max_length, "seed": seed, "device": device, "dtype": dtype,
        "attn": attn, "on_nan": on_nan,
    }  # fmt: skip
    run_verb("drop", honeloom.drop, settings("drop", given, set_), out=choose_out(out, output_dir), overwrite=overwrite,
             resume=resume, as_json=json, dry_run=dry_run, calibrate=calibrate, push_to_hub=push_to_hub)  # fmt: skip
