"""From raw rows to a smaller model that is better at one domain, by one recipe; and the recipe without each stage.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/loop/run.py [--data DIR] [--out DIR]

Makes the rows, runs loop.yaml on base6m, then variants of it that lack one stage each, and writes RESULT.md. --data
holds models/ and instruct/ (default: ../shared/data beside the repository). Every run is kept in --out (default
~/.cache/honeloom-benchmarks/loop), so that a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

import honeloom
from honeloom.config.load import dump_yaml, load_yaml
from honeloom.evaluation.statistics import Comparison, macro_bootstrap
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


def without(recipe: dict[str, Any], what: str) -> dict[str, Any]:
    """The recipe without one of its stages: what took its result takes what it was made of."""
    stages = {k: json.loads(json.dumps(v)) for k, v in recipe["stages"].items() if k not in ("before", "tuned")}
    stages["after"]["evaluate"].pop("against")
    if what in ("pick", "near"):  # as many rows, drawn at random
        keep = stages[what]["select"]["keep"]
        stages[what] = {"select": {"rows": "$pool", "method": {"type": "random"}, "keep": keep}}
    elif what in ("general", "expert"):  # one tuned model is nothing to merge
        other = "expert" if what == "general" else "general"
        merged = {"models": [f"${other}"], "base_model": "$model", "method": {"type": "task_arithmetic"}}
        stages["glued"] = {"merge": merged}
        del stages[what]
    elif what == "glued":
        stages["glued"] = {"merge": {"models": ["$general", "$expert"], "base_model": "$model"}}
    elif what == "heal":
        small = stages["small"]["drop"]
        stages["small"] = {"drop": {k: v for k, v in small.items() if not k.startswith("heal")}}
    elif what == "drop":
        del stages["small"]
        stages["after"]["evaluate"]["model"] = "$glued"
    return {**recipe, "stages": stages}


VARIANTS = {
    "pick": "rows for the general model at random, not by DaaR",
    "near": "rows for the expert at random, not those like the target's",
    "general": "the expert alone",
    "expert": "the general model alone",
    "glued": "the plain mean of both, weights not searched",
    "heal": "dropped, not healed",
    "drop": "not dropped",
}


def run_all(data: Path, out: Path) -> dict[str, Report]:
    """The recipe, and every variant beside a copy of it, so that equal stages are taken over."""
    recipe = dict(load_yaml(HERE / "loop.yaml"))
    reports = {"": honeloom.run(HERE / "loop.yaml", set=settings(data, out), output_dir=out / "full", mode="resume")}
    for what in VARIANTS:
        folder = out / f"without-{what}"
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(out / "full", folder)
        file = out / f"without-{what}.yaml"
        file.write_text(dump_yaml(without(recipe, what)), encoding="utf-8")
        reports[what] = honeloom.run(file, set=settings(data, out), output_dir=folder, mode="overwrite")
        print(f"without {what}: done", flush=True)
    return reports


# --- numbers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Summed loss and tokens of every test row, (N, 2), with its domain."""

    values: npt.NDArray[np.float64]
    domains: list[str]

    @classmethod
    def of(cls, stage: Path) -> Losses:
        """What an evaluation wrote, in the order of ids."""
        table = pq.read_table(stage / "examples.parquet").to_pydict()
        rows = sorted(zip(table["id"], table["domain"], table["loss_sum"], table["tokens"], strict=True))
        return cls(np.array([r[2:] for r in rows], dtype=np.float64), [r[1] for r in rows])

    def shares(self, *, target: bool) -> dict[str, float]:
        """The target alone, or every domain alike."""
        known = sorted(set(self.domains))
        return {TARGET: 1.0} if target else dict.fromkeys(known, 1 / len(known))

    def mean(self, *, target: bool) -> float:
        """Nats per token."""
        found = 0.0
        for domain, share in self.shares(target=target).items():
            total = self.values[[d == domain for d in self.domains]].sum(axis=0)
            found += share * float(total[0] / total[1])
        return found

    def less(self, other: Losses, *, target: bool) -> Comparison:
        """Paired difference with its interval."""
        return macro_bootstrap(self.values, other.values, self.domains, self.shares(target=target))


def interval(c: Comparison) -> str:
    """A difference as text."""
    return f"{c.difference:+.4f} [{c.low:+.4f}, {c.high:+.4f}]"


def stage(run: Path, name: str) -> Path:
    """The folder of a stage."""
    return next(p for p in sorted((run / "stages").iterdir()) if p.name.split("-", 1)[1] == name)


def details(run: Path, name: str) -> dict[str, Any]:
    """Of a stage's report."""
    found: dict[str, Any] = json.loads((stage(run, name) / "report.json").read_text(encoding="utf-8"))
    return found


def goals(run: Path, seconds: float, base: Losses, tuned: Losses, after: Losses) -> list[tuple[str, str, bool]]:
    """What the recipe must reach."""
    cost = details(run, "small")["details"]
    cache, params = (cost[k]["after"] / cost[k]["before"] - 1 for k in ("kv_bytes_per_token", "params"))
    better = after.less(base, target=True)
    near = after.mean(target=True) / tuned.mean(target=True) - 1
    macro = after.mean(target=False) / base.mean(target=False) - 1
    return [
        ("under 20 minutes", f"{seconds / 60:.1f}", seconds < 1200),
        ("at least 25% fewer bytes of cache", f"{cache:+.1%}", cache <= -0.25),
        ("at least 5% fewer parameters", f"{params:+.1%}", params <= -0.05),
        (f"loss on {TARGET} lower than base6m's, interval without 0", interval(better), better.high < 0),
        (f"loss on {TARGET} at most 2% above that of the tuned model before the drop", f"{near:+.2%}", near <= 0.02),
        ("macro loss over all domains at most 1% above base6m's", f"{macro:+.2%}", macro <= 0.01),
    ]


def write_page(file: Path, out: Path, seconds: float) -> None:
    """RESULT.md."""
    full = out / "full"
    base, tuned, after = (Losses.of(stage(full, name)) for name in ("before", "tuned", "after"))
    reached = goals(full, seconds, base, tuned, after)
    measured = [("base6m", base), ("tuned and glued", tuned), ("dropped and healed", after)]
    table = [
        f"| {name} | {x.mean(target=True):.4f} | {interval(x.less(base, target=True))} | {x.mean(target=False):.4f} | "
        f"{interval(x.less(base, target=False))} |"
        for name, x in measured
    ]
    removed = []
    for what, how in VARIANTS.items():
        other = Losses.of(stage(out / f"without-{what}", "after"))
        removed.append(
            f"| {what} | {how} | {other.mean(target=True):.4f} | {interval(other.less(after, target=True))} | "
            f"{other.mean(target=False):.4f} | {interval(other.less(after, target=False))} |"
        )
    names = [
        p.name.split("-", 1)[1] for p in sorted((full / "stages").iterdir(), key=lambda p: int(p.name.split("-")[0]))
    ]
    costs = [
        f"| {n} | {d['verb']} | {d['cost']['seconds']:.0f} | {d['cost']['cpu_seconds']:.0f} |"
        for n in names
        if (d := details(full, n))
    ]
    missed = [f"- {name}: {told}." for name, told, met in reached if not met]
    file.write_text(
        PAGE.format(
            machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
            f"{torch.__version__}",
            goals="\n".join(f"| {n} | {t} | {'yes' if m else 'no'} |" for n, t, m in reached),
            missed="\n".join(missed) or "Nothing.", target=TARGET, losses="\n".join(table), rows=len(base.domains),
            target_rows=base.domains.count(TARGET), domains=len(set(base.domains)), removed="\n".join(removed),
            costs="\n".join(costs),
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

The same recipe with one stage replaced by what one would do without it; differences are to the whole recipe, so above 0
the stage has helped.

| without | instead | {target} | less the whole | macro | less the whole |
| --- | --- | --- | --- | --- | --- |
{removed}

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
    reports = run_all(data, out)
    write_page(HERE / "RESULT.md", out, reports[""].cost.seconds)


if __name__ == "__main__":
    main()
