"""Do SHED's values find bad sources and wrong rows of the lab's pool?

Usage: OMP_NUM_THREADS=1 python benchmarks/selection/values.py [--out DIR]

A quarter of the pool's sources answer wrongly in 90% of their rows, and 10% of all other rows are wrong. Players are
the sources, then clusters of rows. Row scores are those of their player; the oracle knows each player's true share of
wrong rows, which is the most that scores per player can tell. The planted answers choose nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

import honeloom
from honeloom.lab.splits import truth

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1)
WORKERS = 2
UTILITY = {"steps": 48, "batch_size": 16, "lr": 1e-2, "target_rows": 160}
CAUSE = """
Clusters of vectors hold nearly the same share of wrong rows each (the oracle itself reaches 0.56), so their values tell
which domains the target lacks, and not which rows are wrong. Where bad rows have a source, sources are the players to
value; for single rows see [LAB.md](LAB.md).
"""
CASES: dict[str, dict[str, Any]] = {
    "source": {"budget": 48, "by": "source", "proxies": 128},
    "embedding": {"budget": 60, "by": "embedding", "players": 20, "proxies": 64},
}


def measure(out: Path, case: str, seed: int) -> dict[str, Any]:
    """Value the players, and compare with what was planted."""
    settings = dict(CASES[case])
    budget = settings.pop("budget")
    report = honeloom.select(
        "lab:pool", method={"type": "shed", "curves": 0, "utility": UTILITY, **settings}, model="lab:base",
        target="lab:dev", budget=budget, workers=WORKERS, seed=seed, output_dir=out / f"{case}-{seed}", mode="resume",
    )  # fmt: skip
    planted = truth("pool")
    table = pq.read_table(out / f"{case}-{seed}" / "scores.parquet").to_pydict()
    wrong = np.array([planted[i]["wrong"] for i in table["id"]])
    player, score = np.array(table["cluster"]), np.array(table["score"])
    share = np.bincount(player, wrong) / np.bincount(player)
    value = np.array([score[player == p][0] for p in range(len(share))])
    found = {
        "case": case, "seed": seed, "players": len(share), "evaluations": report.details["evaluations"],
        "noise": report.details["noise"]["sd"], "rows": float(roc_auc_score(wrong, -score)),
        "oracle": float(roc_auc_score(wrong, share[player])), "seconds": report.cost.seconds,
    }  # fmt: skip
    if case == "source":
        found["sources"] = float(roc_auc_score(share > 0.5, -value))
    print(found, flush=True)
    return found


def line_of(r: dict[str, Any]) -> str:
    """One row of the table."""
    sources = f"{r['sources']:.3f}" if "sources" in r else ""
    return (
        f"| {r['case']} | {r['seed']} | {r['players']} | {r['evaluations']} | {r['noise']:.3f} | {sources} | "
        f"{r['rows']:.3f} | {r['oracle']:.3f} | {r['rows'] / r['oracle']:.3f} |"
    )


def main() -> None:
    """Measure both cases with every seed, and write VALUES.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "out" / "values")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = [measure(arguments.out, case, seed) for case in CASES for seed in SEEDS]
    lines = [line_of(r) for r in results]
    missed = [
        f"- {r['case']}, seed {r['seed']}: {name} {value:.3f}, bar 0.9."
        for r in results
        for name, value in (
            ("ROC AUC of sources", r.get("sources", 1.0)),
            ("share of the oracle", r["rows"] / r["oracle"]),
        )
        if value < 0.9
    ]
    seconds = sum(r["seconds"] for r in results)
    text = f"""# Bad sources and wrong rows of the lab by SHED's values

Command: `OMP_NUM_THREADS=1 python benchmarks/selection/values.py`; {seconds:.0f} s, {WORKERS} processes.

{(__doc__ or "").split("DIR]", 1)[1].strip()}

Utility: {UTILITY}. Bars: ROC AUC of sources at least 0.9; ROC AUC of rows at least 0.9 of the oracle's.

| players | seed | n | evaluations | noise sd | AUC, sources | AUC, rows | AUC, oracle | rows over oracle |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

## Not reached

{chr(10).join(missed) or "Nothing."}
{CAUSE if missed else ""}"""
    (HERE / "VALUES.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
