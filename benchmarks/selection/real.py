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
from honeloom.selection.sampling import qwcs, standardise
from honeloom.types.rows import Row

HERE = Path(__file__).resolve().parent
SEEDS = range(10)
SOME, FEW = range(5), range(3)
WORKERS = 2
KEEP = 0.1
WANTED = {"gsm8k": ("math", "math-competition"), "code": ("code",)}
SOURCES = {"gsm8k": ("gsm8k",), "code": ("codealpaca", "gpteacher-codegen")}
LR = {"base6m": 5e-3, "stories260k": 1e-2}
BUDGET = {"base6m": 120, "stories260k": 300}
TUNING = {"steps": 8, "batch_size": 8, "target_rows": 48}
STEPS, BATCH = 30, 8
LENGTH = 128
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
        write(out / f"{name}-test.jsonl", rows[128:248])
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
    order = qwcs(standardise(values, "rank"), label, ids, factor=8.0, seed=seed)
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
        model, [[row] for row in rows], [row.id for row in rows], test, steps=trial.steps, batch_size=BATCH,
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
        ids = selected(folder)
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
            "shed", model, target, players=BUDGET[model] // 2, utility={**TUNING, "lr": LR[model]}
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


def main() -> None:
    """Measure, and write real.json for `report.py`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    domains = prepare(arguments.data, arguments.out)
    trials, lines = plan(arguments.data, arguments.out, domains)
    losses = measure(arguments.data, arguments.out, trials)
    found = {
        "minutes": (time.monotonic() - begun) / 60,
        "choices": lines,
        "losses": [{"model": m, "target": t, "arm": a, "loss": v} for (m, t, a), v in losses.items()],
    }
    (arguments.out / "real.json").write_text(json.dumps(found, indent=1))
    for (model, target, arm), values in losses.items():
        base = losses[model, target, "random"]
        print(model, target, arm, f"{np.mean(values):.4f}", "against random", compared(values, base))


if __name__ == "__main__":
    main()
