"""Planned against measured seconds, memory and disk of whole recipes, stage by stage. Writes RESULT.md.

With --only the page has what was measured of the others before.

Usage: python benchmarks/planning/recipes.py [DATA] [--only NAME]

Every plan and every run is a process of its own, one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = HERE / "out"
SHORT = 2.0
"""Stages that take fewer seconds of the processor are not judged one by one."""
SHIPPED = ("demo", "curate-and-tune", "private-clients", "laptop", "whole-loop")
"""Recipes of the package that need no model of the hub; they run as written, on the built-in lab."""
RECIPES = {
    **{name: ROOT / "src" / "honeloom" / "recipes" / f"{name}.yaml" for name in SHIPPED},
    "real": ROOT / "examples" / "real.yaml",
    "federated": HERE / "federated.yaml",
    "glue": HERE / "glue.yaml",
    "shed": HERE / "shed.yaml",
}


def honeloom(*arguments: object, cache: Path) -> str:
    """Run the command in a fresh process, with a cache of its own; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HONELOOM_CACHE": str(cache)}
    command = [sys.executable, "-m", "honeloom", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def measure(name: str, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Planned and measured numbers of every stage of a recipe."""
    given: list[object] = [RECIPES[name]]
    if name not in SHIPPED:
        given += ["--set", f"model={data / 'models' / 'base6m'}"]
        rows = "cot-creak" if name == "glue" else "mixed_demo"
        given += ["--set", f"rows={data / 'instruct' / f'{rows}.jsonl.gz'}"]
    if name == "real":
        given += ["--set", "tuned.max_steps=30"]
    out = folder / name
    plan = json.loads(honeloom("run", *given, "--output-dir", out, "--dry-run", "--calibrate", "--json", cache=folder))
    report = json.loads(honeloom("run", *given, "--output-dir", out, "--json", cache=folder))
    found = []
    for planned, stage in zip(plan["stages"], report["details"]["stages"], strict=True):
        place = Path(stage["out"])
        cost = json.loads((place / "report.json").read_bytes())["cost"]
        disk = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        found.append({"recipe": name, "stage": planned["stage"], "verb": planned["verb"], "planned": planned["cost"],
                      "measured": {**cost, "disk_bytes": disk}})  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


def ratio(stage: dict[str, Any], planned: str, measured: str) -> float:
    """Planned over measured."""
    return float(stage["planned"][planned]) / float(stage["measured"][measured])


def off(ratios: Sequence[float]) -> str:
    """Median of how far ratios are from 1, as a share of the measured."""
    return f"{median(abs(r - 1) for r in ratios):.0%}"


def line(stage: dict[str, Any]) -> str:
    """A row of the table of stages."""
    p, m = stage["planned"], stage["measured"]
    cells = [f"{p['cpu_seconds']:.1f}", f"{m['cpu_seconds']:.1f}", f"{ratio(stage, 'cpu_seconds', 'cpu_seconds'):.2f}",
             f"{p['seconds']:.1f}", f"{m['seconds']:.1f}"]  # fmt: skip
    for planned, measured in (("memory_bytes", "peak_rss_bytes"), ("disk_bytes", "disk_bytes")):
        cells += [f"{p[planned] / 1e6:,.0f}", f"{m[measured] / 1e6:,.0f}", f"{ratio(stage, planned, measured):.2f}"]
    return f"| {stage['recipe']} | {stage['stage']} ({stage['verb']}) | " + " | ".join(cells) + " |"


def totals(name: str, stages: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """Ratio of a recipe's seconds, and its row."""
    sums = {k: [sum(s[w][k] for s in stages) for w in ("planned", "measured")] for k in ("cpu_seconds", "seconds")}
    cpu = sums["cpu_seconds"][0] / sums["cpu_seconds"][1]
    cells = [f"{sums['cpu_seconds'][0]:.0f}", f"{sums['cpu_seconds'][1]:.0f}", f"{cpu:.2f}",
             f"{sums['seconds'][0]:.0f}", f"{sums['seconds'][1]:.0f}"]  # fmt: skip
    return cpu, f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and write RESULT.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", choices=RECIPES)
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    for name in [arguments.only] if arguments.only else list(RECIPES):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, arguments.data.resolve(), Path(folder))
        (OUT / f"{name}.json").write_text(json.dumps(found))
    write_page()


def write_page() -> None:
    """Write RESULT.md from what was measured of every recipe."""
    found = {n: json.loads((OUT / f"{n}.json").read_text()) for n in RECIPES if (OUT / f"{n}.json").is_file()}
    stages = [stage for some in found.values() for stage in some]
    judged = [s for s in stages if s["measured"]["cpu_seconds"] >= SHORT]
    whole = {name: totals(name, some) for name, some in found.items()}
    text = TEXT.format(
        stages="\n".join(map(line, stages)), recipes="\n".join(row for _, row in whole.values()), short=SHORT,
        shipped=", ".join(f"`{n}`" for n in SHIPPED),
        shipped_off=off([r for n, (r, _) in whole.items() if n in SHIPPED]),
        recipe_off=off([r for r, _ in whole.values()]), judged=len(judged),
        stage_off=off([ratio(s, "cpu_seconds", "cpu_seconds") for s in judged]),
        memory_off=off([ratio(s, "memory_bytes", "peak_rss_bytes") for s in stages]),
        disk_off=off([ratio(s, "disk_bytes", "disk_bytes") for s in stages]),
    )  # fmt: skip
    (HERE / "RESULT.md").write_text(text)


TEXT = """# Planned and measured: seconds, memory and disk of whole recipes

Command: `python benchmarks/planning/recipes.py`. `honeloom run RECIPE --dry-run --calibrate`, then the run, each in a
process of its own, on a two-core machine without a GPU that other work shared. The yardstick is therefore the time of
the processor (`cost.cpu_seconds`), with one thread; elapsed seconds stand beside it and are worth as much as the cores
were quiet. The shipped recipes ({shipped}) run as written, on the built-in lab; the
others on base6m (6 million weights) and 5,559 instruction rows, `real` with 30 steps, `glue` on the 6,715 rows of one
domain.

Medians of how far the plan was from what was measured: {shipped_off} of a shipped recipe's seconds, {recipe_off} of any
recipe's; {stage_off} of a stage's, over the {judged} stages that took {short:.0f} seconds or more; {memory_off} of peak
memory and {disk_off} of disk, over all stages.

| recipe | planned cpu s | measured | ratio | planned s | measured |
|---|---|---|---|---|---|
{recipes}

By stage; memory and disk in MB. Peak memory is that of the process up to and with the stage.

| recipe | stage | plan cpu s | real | ratio | plan s | real | plan memory | real | ratio | plan disk | real | ratio |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{stages}

Not in the seconds: hashing of inputs before a stage, the report's page, and what a note of the plan says is not counted
(clusters and probes of selections, decompositions). A search that ends early takes less than planned: evaluations are
"at most".
"""


if __name__ == "__main__":
    main()
