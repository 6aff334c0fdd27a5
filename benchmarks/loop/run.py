"""From raw rows to a smaller model that is better at one domain, by one recipe; and the recipe without each stage.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/loop/run.py [--data DIR] [--out DIR]

Makes the rows, runs loop.yaml on base6m, then its ablation, and writes RESULT.md. --data holds models/ and instruct/
(default: ../shared/data beside the repository). The run is kept in --out (default ~/.cache/honeloom-benchmarks/loop),
so that a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import honeloom
from honeloom.types.report import Report

HERE = Path(__file__).resolve().parent
TARGET = "code"
SEARCH, TEST, TARGET_TEST = 12, 40, 200
"""Rows of a domain to search with, to test with, and to test the target with."""


def unseen(row_id: str) -> bool:
    """Whether base6m was never trained on the row."""
    return hashlib.sha256(row_id.encode()).hexdigest()[-1] in "abcdef"


def read(file: Path) -> list[dict[str, str]]:
    """Rows."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def make_rows(data: Path, out: Path) -> None:
    """Pool, target, search and test rows: no id and no question is in two of them."""
    mixed = read(data / "instruct" / "mixed_demo.jsonl.gz")
    pool = [r for r in mixed if not unseen(r["id"])]
    asked = {(r["instruction"], r["input"]) for r in pool}
    fresh = [r for r in mixed if unseen(r["id"]) and (r["instruction"], r["input"]) not in asked]
    taken = {r["id"] for r in mixed}
    by_domain: dict[str, list[dict[str, str]]] = {}
    for row in fresh:
        by_domain.setdefault(row["domain"], []).append(row)
    search = [r for rows in by_domain.values() for r in rows[:SEARCH]]
    test = [r for rows in by_domain.values() for r in rows[SEARCH + 24 * (rows[0]["domain"] == TARGET) :][:TEST]]
    target = by_domain[TARGET][SEARCH : SEARCH + 24]
    more = [r for name in ("codealpaca", "gpteacher-codegen") for r in read(data / "instruct" / f"{name}.jsonl.gz")]
    more = [r for r in more if unseen(r["id"]) and r["id"] not in taken]
    test += sorted(more, key=lambda r: hashlib.sha256(r["id"].encode()).hexdigest())[: TARGET_TEST - TEST]
    for name, rows in (("pool", pool), ("target", target), ("search", search), ("test", test)):
        write(out / f"{name}.jsonl", rows)
        print(name, len(rows))


# --- runs -----------------------------------------------------------------------------------------------------------


def settings(data: Path, out: Path) -> list[str]:
    """Where the recipe finds its model and rows."""
    rows = [f"{name}={out / name}.jsonl" for name in ("pool", "target", "search", "test")]
    return [f"model={data / 'models' / 'base6m'}", *rows]


def run_all(data: Path, out: Path) -> tuple[Report, Report]:
    """The recipe; and the recipe with its ablation, in the same folder, so that what is whole is taken over."""
    given, folder = settings(data, out), out / "run"
    whole = out / "whole.json"
    if not whole.exists():
        report = honeloom.run(HERE / "loop.yaml", set=[*given, "ablation={}"], output_dir=folder, mode="resume")
        whole.write_text(json.dumps(report.to_json()), encoding="utf-8")
    ablated = honeloom.run(HERE / "loop.yaml", set=given, output_dir=folder, mode="resume")
    return Report.from_json(json.loads(whole.read_text(encoding="utf-8"))), ablated


# --- numbers --------------------------------------------------------------------------------------------------------


def interval(found: Mapping[str, Any]) -> str:
    """A difference as text."""
    low, high = found["ci95"]
    return f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def stage(run: Path, name: str) -> Report:
    """The report of a stage."""
    folder = next(p for p in sorted((run / "stages").iterdir()) if p.name.split("-", 1)[1] == name)
    return Report.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))


def loss(report: Report, domain: str) -> float:
    """Nats per token."""
    return report.metric("loss", domain).value


def goals(run: Path, whole: Report) -> list[tuple[str, str, bool]]:
    """What the recipe must reach."""
    before, tuned, after = (stage(run, name) for name in ("before", "tuned", "after"))
    cost = stage(run, "small").details
    cache, params = (cost[k]["after"] / cost[k]["before"] - 1 for k in ("kv_bytes_per_token", "params"))
    better = after.details["against"]["domains"][TARGET]
    near = loss(after, TARGET) / loss(tuned, TARGET) - 1
    macro = loss(after, "macro") / loss(before, "macro") - 1
    seconds = whole.cost.seconds
    return [
        ("under 20 minutes", f"{seconds / 60:.1f} minutes", seconds < 1200),
        ("at least 25% fewer bytes of cache", f"{cache:+.1%}", cache <= -0.25),
        ("at least 5% fewer parameters", f"{params:+.1%}", params <= -0.05),
        (f"loss on {TARGET} lower than base6m's, interval without 0", interval(better), better["ci95"][1] < 0),
        (f"loss on {TARGET} at most 2% above that of the tuned model before the drop", f"{near:+.2%}", near <= 0.02),
        ("macro loss over all domains at most 1% above base6m's", f"{macro:+.2%}", macro <= 0.01),
    ]


def write_page(file: Path, run: Path, whole: Report, ablated: Report) -> None:
    """RESULT.md."""
    reached = goals(run, whole)
    before = stage(run, "before")
    table = [f"| base6m | {loss(before, TARGET):.4f} | | {loss(before, 'macro'):.4f} | |"]
    for label, name in (("tuned and glued", "tuned"), ("dropped and healed", "after")):
        found = stage(run, name)
        against = found.details["against"]
        table.append(
            f"| {label} | {loss(found, TARGET):.4f} | {interval(against['domains'][TARGET])} | "
            f"{loss(found, 'macro'):.4f} | {interval(against['macro'])} |"
        )
    removed = [
        f"| {e['without']} | {e['instead']} | {interval(e['domains'][TARGET])} | {interval(e['macro'])} |"
        for e in ablated.details["ablation"]
    ]
    costs = [
        f"| {s['name']} | {s['verb']} | {cost.seconds:.0f} | {cost.cpu_seconds:.0f} |"
        for s in whole.details["stages"]
        if (cost := stage(run, s["name"]).cost)
    ]
    unclear = [
        f"{e['without']} ({e['instead']})"
        for e in ablated.details["ablation"]
        if all(f["ci95"][0] <= 0 <= f["ci95"][1] for f in (e["domains"][TARGET], e["macro"]))
    ]
    missed = [f"- {name}: {told}." for name, told, met in reached if not met]
    domains = {m.domain for m in before.metrics if m.name == "loss"} - {"all", "macro"}
    file.write_text(
        PAGE.format(
            machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
            f"{torch.__version__}",
            goals="\n".join(f"| {n} | {t} | {'yes' if m else 'no'} |" for n, t, m in reached),
            missed="\n".join(missed) or "Nothing.", target=TARGET, losses="\n".join(table),
            rows=before.metric("loss", "all").n, target_rows=before.metric("loss", TARGET).n, domains=len(domains),
            removed="\n".join(removed), unclear=", ".join(unclear) or "none", costs="\n".join(costs),
        ),
        encoding="utf-8",
    )  # fmt: skip


PAGE = """# The whole loop

Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/loop/run.py`. {machine}.

`loop.yaml`: rows are chosen from 3,527 mixed ones twice, by DaaR and by likeness to 24 rows of {target}; base6m is
tuned on either; the two are merged with weights that 252 rows choose; three of twelve attentions are dropped and the
rest is healed. Losses in nats per answer token on {rows} other rows of {domains} domains, {target_rows} of them
{target}, none of which base6m or a stage has seen; intervals are 95%, of paired differences.

## Goals

| goal | measured | reached |
| --- | --- | --- |
{goals}

## Not reached

{missed}

## Losses

| model | {target} | less base6m | macro | less base6m |
| --- | --- | --- | --- | --- |
{losses}

## Without each stage

The recipe's own ablation: something else stands in the place of one stage, and what follows is made anew. Differences
are to the whole recipe's result, so above 0 the stage has helped.

| without | instead | {target} | macro |
| --- | --- | --- | --- |
{removed}

Without a clear effect on either: {unclear}.

## Cost

| stage | verb | seconds | CPU seconds |
| --- | --- | --- | --- |
{costs}
"""


def main() -> None:
    """Rows, runs, page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "honeloom-benchmarks" / "loop")
    given = parser.parse_args()
    data, out = given.data.resolve(), given.out.resolve()
    make_rows(data, out)
    whole, ablated = run_all(data, out)
    write_page(HERE / "RESULT.md", out / "run", whole, ablated)


if __name__ == "__main__":
    main()
