"""QUALITY.md: tables of what quality.py measures."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

SEEDS = 5
GOAL = 0.03
"""Largest rise of the loss after healing."""
PARAMETERS = 5_657_280
"""Of base6m."""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def attention_table(part: Mapping[str, Any]) -> str:
    """Loss by metric and number of attentions; seeds of random as one row."""
    curves = part["curves"]
    seeds = [curves[f"random {s}"] for s in range(SEEDS)]
    mean = [statistics.mean(c) for c in zip(*seeds, strict=True)]
    spread = [f"{m:.4f} ({min(c):.2f} to {max(c):.2f})" for m, c in zip(mean, zip(*seeds, strict=True), strict=True)]
    rows = [[name, *(f"{v:.4f}" for v in curve)] for name, curve in curves.items() if not name.startswith("random")]
    rows.append([f"random, mean of {SEEDS}", f"{mean[0]:.4f}", *spread[1:]])
    errors = ["standard error of cosine's rise", *(f"{e:.4f}" for e in part["stderr"])]
    return table(["metric", *(f"{n} gone" if n else "none" for n in range(len(mean)))], [*rows, errors])


def beats(part: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Whether cosine is below random's mean and below the last layers, from two on."""
    curves, found = part["curves"], []
    seeds = list(zip(*(curves[f"random {s}"] for s in range(SEEDS)), strict=True))
    for rival, losses in (("the mean of random", [statistics.mean(s) for s in seeds]), ("the last n", curves["last"])):
        gaps = [losses[n] - curves["cosine"][n] for n in range(2, len(losses))]
        told = ", ".join(f"{g:+.3f}" for g in gaps)
        found.append((f"base6m: cosine is below {rival} for n = 2 to {len(losses) - 1}", told, min(gaps) > 0))
    return found


def kind_table(points: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Loss, parameters and cache of every kind by halves dropped."""
    names = ["attention", "MLP", "block", "joint", "joint, native"]
    rows = []
    for n in range(2, 13):
        cells: list[str] = [str(n)]
        for name in names:
            found = [p for p in points if p["kind"] == f"{name}, {metric}" and p["units"] == n]
            cells.append(
                f"{found[0]['loss']:.3f} ({found[0]['params'] / 1e6:.2f}, {found[0]['kv']:,})" if found else ""
            )
        rows.append(cells)
    return table(["halves", *names], rows)


def joint_rows(points: Sequence[Mapping[str, Any]], metric: str, whole: int) -> list[tuple[int, Any, Any]]:
    """For every budget of dropped parameters: the joint plan, and the best single kind that drops as much."""
    single = [p for p in points if p["kind"] in {f"{k}, {metric}" for k in ("attention", "MLP", "block")}]
    joint = [p for p in points if p["kind"] == f"joint, budget, {metric}"]
    goals = sorted({whole - p["params"] for p in single if p["units"] >= 6})
    found = []
    for goal in goals:
        enough = [p for p in joint if whole - p["params"] >= goal]
        rivals = [p for p in single if whole - p["params"] >= goal]
        if enough and rivals:
            nearest = max(enough, key=lambda p: p["params"])
            found.append((goal, nearest, min(rivals, key=lambda p: p["loss"])))
    return found


def joint_table(rows: Sequence[tuple[int, Any, Any]]) -> str:
    """The comparison at equal dropped parameters."""
    lines = []
    for goal, joint, rival in rows:
        halves = f"{len(joint['attention'])} attentions, {len(joint['mlp'])} MLPs"
        better = joint["loss"] <= rival["loss"]
        lines.append([f"{goal:,}", halves, f"{joint['loss']:.4f}", f"{rival['kind'].split(',')[0]}, {rival['units']}",
                      f"{rival['loss']:.4f}", "yes" if better else "no"])  # fmt: skip
    return table(
        ["parameters at least", "joint plan", "loss", "best single kind, halves", "loss", "joint as good"], lines
    )


def speed_table(found: Mapping[str, float]) -> str:
    """Tokens per second beside the whole model's."""
    whole = found["none"]
    rows = [[name, f"{value:.1f}", f"{value / whole:.2f}x"] for name, value in found.items()]
    return table(["dropped, halves", "tokens/s", "of the whole model"], rows)


def heal_table(arms: Mapping[str, Any], whole: float, dropped: float) -> str:
    """Losses after healing."""
    rows = [["none", "0", "", f"{dropped:.4f}", f"{dropped / whole - 1:+.2%}", ""]]
    for name, arm in arms.items():
        rise = f"{arm['loss'] / whole - 1:+.2%}"
        rows.append([name, f"{arm['tokens']:,}", arm["steps"], f"{arm['loss']:.4f}", rise, f"{arm['cpu_seconds']:.0f}"])
    return table(["healing", "tokens", "steps", "loss", "above the source", "CPU s"], rows)


def write_page(file: Path, parts: Mapping[str, Any], *, calibration: int, context: int, rank: int) -> None:
    """QUALITY.md."""
    base = parts["base6m"]
    whole, dropped = base["curves"]["cosine"][0], base["curves"]["cosine"][6]
    goals = beats(base)
    joint = {metric: joint_rows(parts["kinds"], metric, PARAMETERS) for metric in ("cosine", "kl")}
    for metric, rows in joint.items():
        worse = [f"{goal:,}" for goal, plan, rival in rows if plan["loss"] > rival["loss"]]
        told = f"{len(rows) - len(worse)} of {len(rows)} budgets" + (f"; not at {', '.join(worse)}" if worse else "")
        goals.append((f"joint ({metric}) is at least as good as the best single kind that drops as many parameters, "
                      "from what 6 halves have", told, not worse))  # fmt: skip
    best = min(parts["healing"].items(), key=lambda item: item[1]["loss"])
    rise = best[1]["loss"] / whole - 1
    tokens = f"{best[1]['tokens']:,}"
    what = f"six of twelve attentions dropped, healed with {tokens} tokens: at most {GOAL:.0%} above the source"
    goals.append((what, f"{rise:+.2%} ({best[0]})", rise <= GOAL))
    lines = [[name, told, "yes" if met else "no"] for name, told, met in goals]
    missed = [f"- {name}: {told}." for name, told, met in goals if not met]
    file.write_text(
        PAGE.format(
            machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}",
            goals=table(["goal", "measured", "reached"], lines), missed="\n".join(missed) or "Nothing.",
            base=attention_table(base), stories=attention_table(parts["stories260k"]), rows=base["rows"],
            tokens=f"{base['tokens']:,}", calibration=calibration,
            cosine=kind_table(parts["kinds"], "cosine"), kl=kind_table(parts["kinds"], "kl"),
            joint_cosine=joint_table(joint["cosine"]), joint_kl=joint_table(joint["kl"]),
            speeds=speed_table(parts["speeds"]), context=context,
            rank=rank, healing=heal_table(parts["healing"], whole, dropped),
        ),
        encoding="utf-8",
    )  # fmt: skip


PAGE = """# What dropping costs in loss

Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/dropping/quality.py`. {machine}.

base6m, a Llama of 12 layers with 5,657,280 parameters, scored on {calibration} rows that it was trained on; losses in
nats per token on {rows} rows that it was not trained on, {tokens} tokens of 15 kinds of instructions as plain text.
stories260k, a Llama of 5 layers: scored on {calibration} stories, losses on 100 others.

## Goals

{goals}

## Not reached

{missed}

Why. Importances are measured one unit at a time, and a joint plan adds them up: what the halves of one layer do
together is in no sum, so that at some budgets whole blocks cost less. The divergence of the next token ranks single
halves well, and adds up worse than the cosine does. Healing: the loss below still falls with the number of tokens, and
400,000 are 1.3% of the 29.8 million that base6m was trained on. How many would do was not measured.

## Attentions, base6m

{base}

## Attentions, stories260k

{stories}

## Kinds

n halves of base6m dropped, an attention or an MLP each; a block has two. Every cell: loss (parameters left in
millions, bytes of cache per token left). "Joint" is one ranking of both halves; "native" leaves whole blocks, which
plain transformers loads. By cosine:

{cosine}

By the divergence of the next token (kl):

{kl}

## Joint against single kinds at equal parameters

The joint plan is the one of least total importance that drops at least so many parameters, beside the best plan of
one kind that drops as many. By cosine:

{joint_cosine}

By kl:

{joint_kl}

## Speed

Decoding of one row behind {context} tokens in the cache of transformers, one thread; plans take turns three times,
medians of single steps. Plans by cosine. The machine was shared, and base6m is so small that a step is mostly the
overhead of Python; orders that make no sense, such as more dropped and slower, are that noise. DECODE.md has a wider
model.

{speeds}

## Healing

Six attentions dropped by cosine, then LoRA of rank {rank} on rows of the corpus that base6m was trained on, one pass.

{healing}
"""
