"""Federated zeroth-order tuning beside first-order tuning: losses by forward passes, rates of clients, bytes.

Usage: OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/federated/fedmezo.py [DATA] [--out DIR] [--only PART]

DATA holds models/stories260k, models/base6m and instruct/ (default: ../shared/data beside the repository). Finished
runs are kept in DIR, so that an interrupted benchmark goes on; parts may run in two processes. Writes FEDMEZO.md.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from fedmezo_arms import (
    BUDGETS,
    GIVEN,
    LOCAL,
    MESSAGES,
    RATES,
    ROUNDS,
    SEEDS,
    SHORT,
    SHOWN,
    TIMES,
    first_order,
    messages,
    personal,
    sgd,
    swept,
    worlds,
    zeroth_order,
)
from fedmezo_runs import macro
from tunings import interval

HERE = Path(__file__).resolve().parent
PUBLISHED = "A and B, normal (as published)"
BASIC = "B alone, signs"
Arm = dict[str, Any]
AT = {"stories260k": (10,), "base6m": TIMES}
"""Multiples of forward passes by model."""


def held(arm: Arm, mark: int) -> np.ndarray[Any, Any]:
    """Held-out loss of every seed after some rounds."""
    return np.array([macro(run["held"][str(mark)]) for run in arm["runs"]])


def gained(arm: Arm, mark: int) -> np.ndarray[Any, Any]:
    """How far the loss fell from the start, by seed."""
    return held(arm, 0) - held(arm, mark)


def with_interval(values: Sequence[float] | np.ndarray[Any, Any], form: str = ".4f") -> str:
    middle, half = interval(np.asarray(values))
    return f"{middle:{form}} ± {half:{form}}"


def measure(data: Path, out: Path, only: str | None) -> dict[str, Any]:
    """All runs that the page is made of, or a part of them."""
    at = worlds(data, out)
    found: dict[str, Any] = {"worlds": at}
    for name in at:
        if only in (None, name):
            found[name] = compared(at[name])
    if only in (None, "rates"):
        small = at["stories260k"]
        lr = zeroth_order(small, BASIC, AT["stories260k"])["rates"][0][0] / 2
        found |= {
            "lr": lr,
            "personal": personal(small, lr),
            "messages": messages(at["base6m"]),
            "swept": swept(small, lr),
        }
    return found


def compared(at: Any) -> dict[str, Any]:
    """Every arm on a model, and what the paper compares with."""
    arms = {arm: zeroth_order(at, arm, AT[at.name]) for arm in SHOWN[at.name]}
    found = {"first": first_order(at), "arms": arms}
    if at.name == "stories260k":
        found["sgd, the same rate"] = sgd(at, arms[PUBLISHED]["rates"][0][0], AT[at.name])
        found["sgd, its best rate"] = sgd(at, None, AT[at.name])
    return found


# the page


def goals(found: Mapping[str, Any]) -> str:
    small, large = found["stories260k"], found["base6m"]
    first = gained(small["first"], small["first"]["mark"])
    best = max(small["arms"], key=lambda arm: gained(small["arms"][arm], small["arms"][arm]["marks"][0]).mean())
    share = gained(small["arms"][best], small["arms"][best]["marks"][0]) / first
    basic = large["arms"][BASIC]
    last = gained(basic, basic["marks"][-1])
    middle, half = interval(last)
    saved = rounds_saved(found["personal"])
    fewer, spread = interval(np.asarray(saved["difference (the paper's best)"]))
    sent = found["messages"]["ffa, mezo, scalars"]["bytes_up"]
    payload = 4 * MESSAGES["ffa, mezo, scalars"]["local_steps"]  # a float32 for each step
    rows = [
        (f"stories260k, ten times the forward passes: at least 30% of first-order's reduction ({best})",
         with_interval(share, ".0%"), share.mean() >= 0.3),
        (f"base6m, 100 times: below the start, interval without 0 ({BASIC})", with_interval(last), middle - half > 0),
        ("rates of clients by difference: at least 15% fewer rounds to the common rate's final loss",
         f"{fewer:.0%} ± {spread:.0%} fewer", fewer >= 0.15),
        ("30 steps as scalars: at most 300 bytes, plus framing", f"{payload}, {sent:.0f} with framing", payload <= 300),
    ]  # fmt: skip
    return "\n".join(f"| {goal} | {value} | {'yes' if fine else '**no**'} |" for goal, value, fine in rows)


def comparison(found: Mapping[str, Any], times: Sequence[int]) -> str:
    """Loss and reduction of every arm at every multiple."""
    first = found["first"]
    base, mark = gained(first, first["mark"]), first["mark"]
    lines = [
        "| arm | lr | " + " | ".join(f"held-out loss, {t} x" for t in times)
        + " | fell by, at the end | of first-order's |",
        "|---|---|" + "---|" * (len(times) + 2),
        f"| AdamW, LoRA (fedit) | {first['rates'][0][0]:g} | "
        + " | ".join([with_interval(held(first, mark)) + " (1 x)", *[""] * (len(times) - 1)])
        + f" | {with_interval(base)} | |",
    ]  # fmt: skip
    others = {**found["arms"], **{k: v for k, v in found.items() if k.startswith("sgd")}}
    for name, arm in others.items():
        last = gained(arm, arm["marks"][-1])
        losses = " | ".join(with_interval(held(arm, m)) for m in arm["marks"])
        share = f"{last.mean() / base.mean():.0%}" if base.mean() > 0 else ""
        lines.append(f"| {name} | {arm['rates'][0][0]:g} | {losses} | {with_interval(last)} | {share} |")
    return "\n".join(lines)


def curve(run: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Mean of the clients' losses as each round began, on their own rows."""
    return np.array([line["loss_before"] for line in run["rounds"]])


def rounds_saved(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """By kind of rate and seed: how many rounds fewer, as a share, until the common rate's last loss is reached.

    Losses are means of three rounds, and between rounds on a straight line; who does not get there counts as 0.
    """
    smooth = {name: [np.convolve(curve(r), np.ones(3) / 3, mode="valid") for r in rs] for name, rs in runs.items()}
    found: dict[str, list[float]] = {}
    for name, curves in smooth.items():
        found[name] = []
        for mine, common in zip(curves, smooth["one rate for all"], strict=True):
            target, whole = float(common.min()), int(common.argmin()) + 1
            found[name].append(1 - crossing(mine, target) / whole)
    return found


def crossing(values: np.ndarray[Any, Any], target: float) -> float:
    """Rounds until a curve is at the target; all of them where it never is."""
    below = np.flatnonzero(values <= target)
    if not len(below):
        return float(len(values))
    k = int(below[0])
    if k == 0:
        return 1.0
    return float(k + (values[k - 1] - target) / (values[k - 1] - values[k]))


def personal_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    saved = rounds_saved(runs)
    lines = [
        f"| rate | fewer rounds to the common rate's lowest loss | own rows, round {ROUNDS} | held-out loss, end |",
        "|---|---|---|---|",
    ]
    for name in RATES:
        own = [curve(run)[-1] for run in runs[name]]
        end = [macro(run["held"][str(ROUNDS)]) for run in runs[name]]
        told = "" if name == "one rate for all" else with_interval(saved[name], ".0%")
        lines.append(f"| {name} | {told} | {with_interval(own)} | {with_interval(end)} |")
    return "\n".join(lines)


def sweep_table(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    lines = ["| what | value | fell by, held-out | squared gradients fall as, theorem |", "|---|---|---|---|"]
    for title, values in found.items():
        for value, runs in values.items():
            fell = [macro(r["held"]["0"]) - macro(r["held"][str(SHORT)]) for r in runs]
            lines.append(f"| {title} | {value} | {np.mean(fell):.3f} ({', '.join(f'{x:.3f}' for x in fell)}) | "
                         f"{theorem(title, value)} |")  # fmt: skip
    return "\n".join(lines)


def theorem(title: str, value: str) -> str:
    """The IID rate of the paper, r^(3/2) / sqrt(N H T), beside that of 8 clients and 10 steps."""
    if title.startswith("clients"):
        return f"{np.sqrt(8 / float(value)):.2f}"
    if title.startswith("local"):
        return f"{np.sqrt(10 / float(value)):.2f}"
    return "1 (if the rank stays)" if title == "LoRA rank" else "1"


def message_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| what travels | up, bytes | down, bytes |", "|---|---|---|"]
    lines += [f"| {name} | {line['bytes_up']:,.0f} | {line['bytes_down']:,.0f} |" for name, line in found.items()]
    return "\n".join(lines)


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Loss over forward passes, both models."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, name in zip(axes, ("stories260k", "base6m"), strict=True):
        part, times = found[name], AT[name]
        first = part["first"]
        axis.axhline(held(first, 0).mean(), color="grey", linestyle=":", label="the base")
        axis.errorbar([1], [held(first, first["mark"]).mean()], yerr=[interval(held(first, first["mark"]))[1]], fmt="s",
                      color="black", label="AdamW, LoRA")  # fmt: skip
        arms = {**part["arms"], **{k: v for k, v in part.items() if k.startswith("sgd")}}
        for arm_name, arm in arms.items():
            means = [held(arm, m).mean() for m in (0, *arm["marks"])]
            halves = [0.0, *(interval(held(arm, m))[1] for m in arm["marks"])]
            axis.errorbar([0.5, *times], means, yerr=halves, fmt="o-", capsize=3, label=arm_name, markersize=4)
        axis.set_xscale("log")
        axis.set_xlabel("forward passes, as multiples of first-order's")
        axis.set_ylabel("held-out loss, nats per token")
        axis.set_title(name)
        top = held(first, 0).mean()
        axis.set_ylim(held(first, first["mark"]).min() - 0.1 * top / 4, top + 0.1)  # what lost its way is out of sight
        axis.legend(fontsize=7, loc="center left")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


PAGE = """# Federated zeroth-order tuning

Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/federated/fedmezo.py`; {minutes:.0f} CPU
minutes of runs, {machine}, 1 thread of a shared machine, fp32; Python {python}, torch {torch}.

Eight clients, rows split by domain unless said, LoRA of rank 8 on all linear layers unless said; {seeds} seeds: of
the order of rows, of first weights and of directions. Loss is in nats per token on held-out rows that no client
has, the mean over domains. ± is half of a 95% interval over the seeds (Student's t). A run goes through the
product's own server, messages and clients, in one process.

| goal | measured | reached |
|---|---|---|
{goals}

![held-out loss over forward passes](fedmezo.png)

## As many forward passes as first-order tuning, and more

First-order: {first}. A two-point step takes two forward passes; a step of AdamW is counted as one, though its
backward pass takes about two more. Every arm is at its best rate of a grid of factors of two, chosen on further
seeds and on rows that neither train nor test, {choice}.

### stories260k

{stories}

"sgd" is the paper's own comparison: FedAvg of adapters (fedit) with plain SGD, as many steps of a client as the
zeroth-order arms make, at the rate of the published arm, {published:g}, and at SGD's own best. At one and the same
rate both fall by about as much per step, for a zeroth-order step is in the mean the gradient's; but SGD bears a
rate that is many times higher, and there it is far ahead.

### base6m

It knows most of the sources above: on them AdamW itself gains a few thousandths in a few steps. So its clients have
rows of three sources that it saw nothing of (gsm8k, codealpaca, gpteacher-codegen; Dirichlet 0.3 over the sources),
batches of 8, and a rate that falls to a tenth (cosine). A run takes six minutes, so there is one zeroth-order arm,
and its rate, {rate:g}, is half of the best of a grid of factors of two (3e-4 to 4.8e-3, constant) at 30 times the
passes on the rows of the choice.

{base6m}

## Rates of single clients

stories260k, B alone, signs, scalars, {rounds} rounds of 10 steps at {lr:g} (half the best rate above), five seeds.

{personal}

Rounds are counted on the clients' own rows, as each round begins (means of three rounds).

## What else decides how fast it goes

As above, {short} rounds, one seed; one thing is varied, the rest stays: 8 clients, 10 steps, mu 1e-3, rank 8, one
domain or some to each client. The last column is what the paper's theorem would have the squared gradient be beside
the middle setting.

{swept}

## Bytes of a client in a round

base6m, second round, whole messages as they travel (framing included), mean of the clients. AdamW arms send the
same whatever the steps; zeroth-order arms take 30 steps.

{messages}

{closing}"""


def page(found: Mapping[str, Any], closing: str) -> str:
    budgets = [f"{name} {b.rounds} rounds of {b.steps} AdamW steps, batches of {LOCAL[name]['batch_size']} rows of at "
               f"most {LOCAL[name]['max_length']} tokens" for name, b in BUDGETS.items()]  # fmt: skip
    spent = sum(sum(at.spent) for at in found["worlds"].values())
    return PAGE.format(
        minutes=spent / 60, machine=platform.machine(), python=platform.python_version(), torch=torch.__version__,
        seeds=len(SEEDS), goals=goals(found), first="; ".join(budgets),
        choice="at the end of the run (stories260k)",
        stories=comparison(found["stories260k"], AT["stories260k"]), base6m=comparison(found["base6m"], AT["base6m"]),
        published=found["stories260k"]["arms"][PUBLISHED]["rates"][0][0], rate=GIVEN["base6m"],
        rounds=ROUNDS, lr=found["lr"], personal=personal_table(found["personal"]), short=SHORT,
        swept=sweep_table(found["swept"]), messages=message_table(found["messages"]), closing=closing,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "fedmezo")
    parser.add_argument("--only", choices=(*BUDGETS, "rates"))
    given = parser.parse_args()
    found = measure(given.data, given.out, given.only)
    if given.only is None:
        figure(found, HERE / "fedmezo.png")
        (HERE / "FEDMEZO.md").write_text(page(found, (HERE / "fedmezo_notes.md").read_text()))


if __name__ == "__main__":
    main()
