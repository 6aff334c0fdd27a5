"""Do chosen rows teach what is wanted? SHED beside random and other selectors, on real rows with labels hidden.

Usage: OMP_NUM_THREADS=1 python benchmarks/selection/real.py [DATA] [--out DIR]

DATA holds models/{base6m,stories260k} and instruct/ (default: ../shared/data beside the repository). The pool is
mixed_demo without its labels; targets and tests are rows of GSM8K and of two code sets outside the pool, which base6m
never saw. Each selector chooses once; the seeds draw the rows (where the method draws), their order and the adapters.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.stats import t as student_t

import honeloom
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.utility import TunableModel, TuningUtility
from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.config import ShedConfig
from honeloom.selection.sampling import qwcs, standardise
from honeloom.types.rows import Row

HERE = Path(__file__).resolve().parent
SEEDS = range(10)
SOME, FEW = range(3), range(2)
WORKERS = 2
KEEP = 0.1
WANTED = {"gsm8k": ("math", "math-competition"), "code": ("code",)}
SOURCES = {"gsm8k": ("gsm8k",), "code": ("codealpaca", "gpteacher-codegen")}
LR = {"base6m": 5e-3, "stories260k": 1e-2}
BUDGET = {"base6m": 100, "stories260k": 200}
TUNING = {"steps": 8, "batch_size": 8, "target_rows": 48}
STEPS, BATCH = 20, 8
LENGTH = 128
ALPACA = 3000
DRAW = ShedConfig()
"""How rows are drawn from the values."""
VALUED = {"standardise": "rank", "factor": 8.0}
"""The draw of the valuation's own folder; the values do not depend on it."""
RIVALS = ("dsir", "ifd", "length", "k_center", "dq")


@dataclass(frozen=True)
class Trial:
    """One tuning: on these rows of a pool, in the order of a seed, scored on a test."""

    arm: str
    model: str
    target: str
    seed: int
    ids: tuple[str, ...]
    steps: int = STEPS


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(data: Path, out: Path) -> dict[str, str]:
    """Write the pool without labels, targets and tests; return the domain of every row of the pool."""
    pool = read(data / "instruct" / "mixed_demo.jsonl.gz")
    inside = {row["id"] for row in pool}
    write(out / "pool.jsonl", ({k: v for k, v in row.items() if k not in ("domain", "source")} for row in pool))
    for name, sources in SOURCES.items():
        rows = [r for s in sources for r in read(data / "instruct" / f"{s}.jsonl.gz") if r["id"] not in inside]
        rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
        write(out / f"{name}-target.jsonl", rows[:128])
        write(out / f"{name}-test.jsonl", rows[128:208])
    return {row["id"]: row["domain"] for row in pool}


def select(data: Path, out: Path, method: str, model: str, target: str, **settings: Any) -> tuple[Path, float]:
    """Choose 10% of the pool; return the result's folder and the seconds it took."""
    chosen = out / f"{method}-{model}-{target}"
    used = {"target": out / f"{target}-target.jsonl", "overlap": "leave_out"}
    report = honeloom.select(
        out / "pool.jsonl", method={"type": method, **settings}, model=data / "models" / model, keep="10%",
        max_length=LENGTH, output_dir=chosen, mode="resume",
        **({} if method in ("ifd", "length", "k_center", "dq") else used),
        **({"budget": BUDGET[model], "workers": WORKERS} if method == "shed" else {}),
    )  # fmt: skip
    return chosen, report.cost.seconds


def selected(folder: Path) -> list[str]:
    table = pq.read_table(folder / "scores.parquet", columns=["id", "selected"])
    return table.filter(table["selected"])["id"].to_pylist()


def drawn(folder: Path, seed: int) -> list[str]:
    """Another draw from SHED's clusters: the values stay, the seed changes."""
    table = pq.read_table(folder / "scores.parquet", columns=["id", "cluster"])
    table = table.filter(table["cluster"].is_valid())
    values = np.array(pq.read_table(folder / "clusters.parquet")["value"].to_pylist())
    ids, label = table["id"].to_pylist(), np.array(table["cluster"].to_pylist())
    order = qwcs(standardise(values, DRAW.standardise), label, ids, factor=DRAW.factor, seed=seed)
    return [ids[i] for i in order[: len(selected(folder))]]


@cache
def rows_of(path: Path) -> dict[str, Row]:
    return {row.id: row for row in RowSet.scan(resolve_sources([str(path)]))}


def run_trial(data: Path, out: Path, trial: Trial) -> float:
    """Held-out loss after tuning."""
    torch.set_num_threads(1)
    pool = rows_of(out / "pool.jsonl")
    rows = [pool[i] for i in trial.ids]
    test = list(rows_of(out / f"{trial.target}-test.jsonl").values())
    model = TunableModel(
        data / "models" / trial.model, None, trial.model, Loading("cpu"), 8, trial.seed, 16, LENGTH
    )  # fmt: skip
    utility = TuningUtility(
        model, [[row] for row in rows], test, steps=trial.steps, batch_size=BATCH,
        lr=LR[trial.model], score="loss", seed=trial.seed,
    )  # fmt: skip
    return -utility(frozenset(range(len(rows))))


def plan(data: Path, out: Path, domains: dict[str, str]) -> tuple[list[Trial], list[dict[str, Any]]]:
    """Choose with every selector; return the tunings to be done, and a line per choice."""
    trials: list[Trial] = []
    lines: list[dict[str, Any]] = []
    pool = list(domains)

    def add(arm: str, model: str, target: str, sets: Sequence[Sequence[str]], steps: int = STEPS) -> None:
        trials.extend(Trial(arm, model, target, seed, tuple(ids), steps) for seed, ids in enumerate(sets))

    def choose(method: str, model: str, target: str, **settings: Any) -> Path:
        folder, seconds = select(data, out, method, model, target, **settings)
        sets = [drawn(folder, seed) for seed in SEEDS] if method == "shed" else [selected(folder)]
        ids = [i for one in sets for i in one]
        share = sum(domains[i] in WANTED[target] for i in ids) / len(ids)
        all_of = sum(d in WANTED[target] for d in domains.values()) / len(domains)
        details = json.loads((folder / "report.json").read_text())["details"]
        lines.append(
            {"method": method, "model": model, "target": target, "share": share, "times": share / all_of,
             "evaluations": details["evaluations"], "seconds": seconds, "details": details}
        )  # fmt: skip
        print(method, model, target, f"share {share:.3f} = {share / all_of:.2f} x", f"{seconds:.0f} s", flush=True)
        return folder

    count = round(KEEP * len(pool))
    random = [[pool[i] for i in np.argsort(keyed_uniform(seed, "benchmark/random", pool))[:count]] for seed in SEEDS]
    shed = {}
    for model, target in (("stories260k", "gsm8k"), ("base6m", "gsm8k"), ("base6m", "code")):
        shed[model, target] = choose(
            "shed", model, target, players=BUDGET[model] // 2, utility={**TUNING, "lr": LR[model]}, **VALUED
        )
    for target in WANTED:
        add("shed", "base6m", target, [drawn(shed["base6m", target], seed) for seed in SEEDS])
        add("random", "base6m", target, random)
    for method in RIVALS:
        add(method, "base6m", "gsm8k", [selected(choose(method, "base6m", "gsm8k"))] * len(SOME))
    add("full, equal steps", "base6m", "gsm8k", [pool] * len(SOME))
    epochs = STEPS * BATCH / count
    add("full, equal epochs", "base6m", "gsm8k", [pool] * len(FEW), round(epochs * len(pool) / BATCH))
    add("shed of stories260k", "base6m", "gsm8k", [drawn(shed["stories260k", "gsm8k"], seed) for seed in SEEDS])
    add("shed", "stories260k", "gsm8k", [drawn(shed["stories260k", "gsm8k"], seed) for seed in SEEDS])
    add("random", "stories260k", "gsm8k", random)
    add("shed of base6m", "stories260k", "gsm8k", [drawn(shed["base6m", "gsm8k"], seed) for seed in SEEDS])
    return trials, lines


def published_flags(data: Path, out: Path) -> dict[str, dict[str, float]]:
    """How often published selections of Alpaca flag the rows of our top decile, and all rows."""
    rows = read(data / "instruct" / "alpaca.jsonl.gz")[:ALPACA]
    flags = {row["id"]: row["flags"] for row in read(data / "instruct" / "alpaca_quality_flags.jsonl.gz")}
    pool = write(out / "alpaca.jsonl", rows)
    report = honeloom.select(
        pool, method={"type": "shed", "utility": {**TUNING, "lr": LR["stories260k"]}, "curves": 0}, keep="10%",
        model=data / "models" / "stories260k", budget=90, workers=WORKERS, max_length=LENGTH,
        output_dir=out / "alpaca", mode="resume",
    )  # fmt: skip
    top = selected(Path(report.out or ""))
    names = ("cherry_top5pct", "claude_ge_4.5", "random9k")
    found = {}
    for name in names:
        flagged = [name in flags.get(row["id"], ()) for row in rows]
        ours = [name in flags.get(i, ()) for i in top]
        found[name] = {"ours": sum(ours) / len(ours), "all": sum(flagged) / len(flagged)}
    return found


def measure(data: Path, out: Path, trials: Sequence[Trial]) -> dict[tuple[str, str, str], list[float]]:
    """Held-out losses by (model, target, arm), in the order of the seeds."""
    with ProcessPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(run_trial, data, out, trial) for trial in trials]
        losses: dict[tuple[str, str, str], list[float]] = {}
        for trial, future in zip(trials, futures, strict=True):
            losses.setdefault((trial.model, trial.target, trial.arm), []).append(future.result())
            print(trial.model, trial.target, trial.arm, trial.seed, f"{future.result():.4f}", flush=True)
    return losses


def compared(ours: Sequence[float], other: Sequence[float]) -> str:
    """Mean difference of paired losses with the half-width of its 95% interval, and how often ours is lower."""
    gaps = np.array([a - b for a, b in zip(ours, other, strict=False)])
    half = float(student_t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))) if gaps.any() else 0.0
    return f"{gaps.mean():+.4f} ± {half:.4f}, lower in {(gaps < 0).sum()} of {len(gaps)}"


def share_table(choices: Sequence[dict[str, Any]]) -> list[str]:
    """What the choices hold of the wanted domains, whose labels no selector saw."""
    lines = [
        "| selector | model | target | wanted share | times the pool's | evaluations | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in choices:
        lines.append(
            f"| {c['method']} | {c['model']} | {c['target']} | {c['share']:.1%} | {c['times']:.2f} | "
            f"{c['evaluations']} | {c['seconds']:.0f} |"
        )
    return lines


def loss_table(losses: dict[tuple[str, str, str], list[float]]) -> list[str]:
    """Held-out losses of every arm, beside random and beside SHED."""
    lines = [
        "| tuned model | target | rows | loss, nats/token | less random | less shed |",
        "|---|---|---|---|---|---|",
    ]
    for (model, target, arm), values in losses.items():
        random, shed = losses[model, target, "random"], losses[model, target, "shed"]
        beside = [
            "" if arm == name else compared(values, other) for name, other in (("random", random), ("shed", shed))
        ]
        lines.append(f"| {model} | {target} | {arm} | {np.mean(values):.4f} | {beside[0]} | {beside[1]} |")
    return lines


def valuations(choices: Sequence[dict[str, Any]]) -> list[str]:
    """What SHED measured before and after it spent its budget."""
    lines = [
        "| model | target | players | evaluations | noise sd | mean margin | predicted correlation | resolvable | "
        "agreement with the surrogate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in choices:
        d, noise = c["details"], c["details"]["noise"]
        if c["method"] == "shed":
            lines.append(
                f"| {c['model']} | {c['target']} | {d['players']} | {d['evaluations']} | {noise['sd']:.4f} | "
                f"{noise['margin']:.4f} | {noise['predicted_rho']:.2f} | {noise['resolvable']} | "
                f"{d['surrogate_correlation']:.2f} |"
            )
    return lines


def bars(found: dict[str, Any], losses: dict[tuple[str, str, str], list[float]]) -> list[tuple[str, str, bool]]:
    """(claim, figure, met)."""
    chosen = {(c["method"], c["model"], c["target"]): c for c in found["choices"]}
    times = chosen["shed", "base6m", "gsm8k"]["times"]
    ours, random = losses["base6m", "gsm8k", "shed"], losses["base6m", "gsm8k", "random"]
    wins = sum(a < b for a, b in zip(ours, random, strict=True))
    return [
        ("share of maths rows at least 3 times the pool's", f"{times:.2f}", times >= 3),
        ("held-out GSM8K loss below random's in at least 9 of 10 seeds", f"{wins} of 10", wins >= 9),
        ("the whole within 60 minutes", f"{found['minutes']:.0f} minutes", found["minutes"] <= 60),
    ]


def ahead(losses: dict[tuple[str, str, str], list[float]]) -> list[str]:
    """Arms whose mean loss is below SHED's on the same seeds."""
    lines = []
    for (model, target, arm), values in losses.items():
        shed = losses[model, target, "shed"]
        if arm != "shed" and np.mean(values) < np.mean(shed[: len(values)]):
            lines.append(f"- {model}, {target}: {arm}, {compared(values, shed)}.")
    return lines


def write_result(found: dict[str, Any], losses: dict[tuple[str, str, str], list[float]]) -> None:
    """Write RESULT.md."""
    reached = bars(found, losses)
    flags = [f"| {name} | {f['ours']:.1%} | {f['all']:.1%} |" for name, f in found["flags"].items()]
    missed = [f"- {claim}: {figure}." for claim, figure, met in reached if not met]
    text = [
        "# Choosing rows for a target",
        "",
        "Command: `OMP_NUM_THREADS=1 python benchmarks/selection/real.py`. Clustering stands in "
        "[CLUSTERING.md](CLUSTERING.md), "
        "wrong answers of the lab in [LAB.md](LAB.md), bad sources in [VALUES.md](VALUES.md).",
        "",
        f"Pool: 5,559 rows of 21 domains, labels hidden; 10% are kept. LoRA of rank 8, {STEPS} steps of {BATCH} rows, "
        f"at most {LENGTH} tokens; learning rates {LR}. A utility tunes {TUNING['steps']} steps of "
        f"{TUNING['batch_size']} rows and scores {TUNING['target_rows']} target rows; tests are 80 other rows. "
        f"Budget: {BUDGET} evaluations. {WORKERS} "
        "processes on two cores of a shared machine. SHED's shares are means over its draws (QWCS on z-scores, factor "
        f"{DRAW.factor}; chosen among z and rank, factor 1 to 12, by the share of maths rows of one valuation). "
        "Differences are means over seeds with 95% intervals (paired); "
        f"{len(SOME)} seeds for the rivals, {len(FEW)} for all rows at equal epochs, else {len(SEEDS)}.",
        "",
        "## Bars",
        "",
        "| claim | measured | met |",
        "|---|---|---|",
        *(f"| {claim} | {figure} | {'yes' if met else 'no'} |" for claim, figure, met in reached),
        "",
        "## What was chosen",
        "",
        *share_table(found["choices"]),
        "",
        "## What it teaches",
        "",
        *loss_table(losses),
        "",
        "\"shed of M\" are rows that were valued with M and tune another model: the transfer that SHED claims.",
        "",
        "Ahead of SHED's own rows, by the mean over the same seeds:",
        "",
        *(ahead(losses) or ["- nothing."]),
        "",
        "## The valuations",
        "",
        *valuations(found["choices"]),
        "",
        "## Published selections of Alpaca",
        "",
        f"{ALPACA:,} Alpaca rows valued with stories260k on a held-out part of them (no target), 90 evaluations; share "
        "of the top decile that a published selection holds too.",
        "",
        "| published selection | our top decile | all rows |",
        "|---|---|---|",
        *flags,
        "",
        "## Not reached",
        "",
        *(missed or ["Nothing."]),
        "",
    ]  # fmt: skip
    (HERE / "RESULT.md").write_text("\n".join(text))


def main() -> None:
    """Measure, and write RESULT.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    domains = prepare(arguments.data, arguments.out)
    trials, lines = plan(arguments.data, arguments.out, domains)
    begun = time.monotonic()
    losses = measure(arguments.data, arguments.out, trials)
    found: dict[str, Any] = {"choices": lines, "flags": published_flags(arguments.data, arguments.out)}
    found["minutes"] = (time.monotonic() - begun + sum(line["seconds"] for line in lines)) / 60
    rows = [{"model": m, "target": t, "arm": a, "loss": v} for (m, t, a), v in losses.items()]
    (arguments.out / "real.json").write_text(json.dumps({**found, "losses": rows}, indent=1))
    write_result(found, losses)


if __name__ == "__main__":
    main()
