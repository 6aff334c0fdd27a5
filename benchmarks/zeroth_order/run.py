"""Memory and speed of zeroth-order steps, beside inference, backpropagation and the published loop. Writes RESULT.md.

Usage: python benchmarks/zeroth_order/run.py [DATA] [--only memory|speed]

One thread. Memory: a random Llama of 125M parameters, and base6m of DATA (default: ../shared/data beside the
repository), every job in a process of its own. Speed: `speed.py`. With --only, the other part keeps its last figures,
which are in out/figures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numba
import numpy
import torch
import transformers
from theory import SEEDS, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory"))
from measure import write_model  # the memory benchmark's own

HERE = Path(__file__).resolve().parent
LIVE = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Makes glibc give back every freed megabyte at once, so that resident memory is live tensors."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
MB = 1e6
LINES = (
    ("inference", "", "", "fp32"), ("mezo", "lora", "memory", "fp32"), ("mezo", "lora", "speed", "fp32"),
    ("mezo", "full", "memory", "fp32"), ("mezo", "full", "speed", "fp32"), ("adamw", "lora", "", "fp32"),
    ("adamw", "full", "", "fp32"), ("inference", "", "", "bf16"), ("mezo", "lora", "memory", "bf16"),
    ("adamw", "lora", "", "bf16"),
)  # fmt: skip
NAMES = {"lora": "LoRA", "full": "all parameters", "": ""}


def command_output(script: str, *arguments: str, **variables: str) -> Any:
    """The JSON line that a script of this folder prints last."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, **ONE_THREAD, **variables},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def name_of(line: tuple[str, str, str, str]) -> str:
    """What stands in the table."""
    what, method, setting, dtype = line
    if what == "inference":
        return f"inference, {dtype}"
    how = "AdamW" if what == "adamw" else f"zeroth-order, `{setting}`"
    return f"{NAMES[method]}, {how}, {dtype}" + " base" * (dtype == "bf16")


def peaks(model: Path, lines: Any, both: bool) -> list[dict[str, Any]]:
    """Peak of every line at batches of 1 and 4: live tensors, and as it runs where asked for."""
    found = []
    for batch in (1, 4):
        for what, method, setting, dtype in lines:
            job = json.dumps(
                {
                    "what": what,
                    "method": method or "lora",
                    "setting": setting,
                    "dtype": dtype,
                    "batch": batch,
                    "tokens": 512,
                }
            )
            live = command_output("memory_job.py", str(model), job, **LIVE)["peak"]
            seen = command_output("memory_job.py", str(model), job)["peak"] if both else None
            line = (what, method, setting, dtype)
            found.append({"line": line, "name": name_of(line), "batch": batch, "live": live, "seen": seen})
            print(found[-1], flush=True)
    return found


def measured_memory(data: Path) -> dict[str, Any]:
    """Both models."""
    with tempfile.TemporaryDirectory() as folder:
        large = peaks(write_model(Path(folder) / "llama", "100M"), LINES, True)
    small = peaks(data / "models" / "base6m", [LINES[k] for k in (0, 1, 3, 6)], False)
    return {"large": large, "small": small}


def ratios(found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float | None]]:
    """Every line with its ratios to inference on the same batch with the same type."""
    base = {(f["batch"], f["line"][3]): f for f in found if f["line"][0] == "inference"}
    rows = []
    for f in found:
        by = base[f["batch"], f["line"][3]]
        rows.append((f, f["live"] / by["live"], f["seen"] / by["seen"] if f["seen"] else None))
    return rows


def memory_table(found: list[dict[str, Any]]) -> str:
    """Markdown lines."""
    lines = []
    for f, live, seen in ratios(found):
        cells = [f["name"], str(f["batch"]), f"{f['live'] / MB:.0f}", f"{live:.2f}"]
        cells += [f"{f['seen'] / MB:.0f}", f"{seen:.2f}"] if seen else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_of(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median of steps per CPU-second, its quartiles, and ratios turn by turn to the published loop and two passes."""
    found = {}
    for name, mine in seconds.items():
        quarters = statistics.quantiles([1 / s for s in mine], n=4)
        to = {
            other: statistics.median(b / a for a, b in zip(mine, seconds[other], strict=True))
            for other in ("published", "two forward passes")
        }
        found[name] = {
            "rate": quarters[1], "low": quarters[0], "high": quarters[2], "published": to["published"],
            "passes": 1 / to["two forward passes"],
        }  # fmt: skip
    return found


def speed_table(figures: dict[str, Any]) -> str:
    """Markdown tables, one for every model and method."""
    parts = []
    for what, seconds in figures["seconds"].items():
        size = figures["sizes"][what]
        parts.append(
            f"{what}: {size:,} numbers are moved; `speed` keeps {size * 4 / MB:.1f} MB more than `memory`.\n\n"
            "| | steps per CPU-second | quartiles | times the published loop | CPU time, two forward passes = 1 |\n"
            "|---|---|---|---|---|"
        )
        for name, f in speed_of(seconds).items():
            parts[-1] += (
                f"\n| {name} | {f['rate']:.1f} | {f['low']:.1f} to {f['high']:.1f} | {f['published']:.2f} | "
                f"{f['passes']:.2f} |"
            )
    return "\n\n".join(parts)


def goals(memory: dict[str, Any], figures: dict[str, Any]) -> str:
    """Markdown lines: what was to be reached, what was."""
    lines = []

    def add(what: str, bar: str, value: float, reached: bool) -> None:
        lines.append(f"| {what} | {bar} | {value:.2f} | {'yes' if reached else 'no'} |")

    for f, live, _ in ratios(memory["large"]):
        if f["line"][0] == "mezo" and f["line"][2] == "memory":
            add(f"peak memory, {f['name']}, batch {f['batch']}", "at most 1.10 x inference", live, live <= 1.10)
    for what, seconds in figures["seconds"].items():
        found = speed_of(seconds)
        for setting in ("memory", "speed"):
            least = 1.1 if "LoRA" in what else {"memory": 1.3, "speed": 2.0}[setting]
            value = found[f"{setting}, gaussian"]["published"]
            add(f"{what}, `{setting}`, gaussian", f"at least {least} x the published loop", value, value >= least)
            if "LoRA" in what:
                value = found[f"{setting}, gaussian"]["passes"]
                add(f"{what}, `{setting}`, gaussian", "at most 1.15 x two forward passes", value, value <= 1.15)
    return "\n".join(lines)


def main() -> None:
    """Measure and write RESULT.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--only", choices=("memory", "speed"))
    arguments = parser.parse_args()
    if arguments.only is None:
        (HERE / "THEORY.md").write_text(report(SEEDS), encoding="utf-8")
    path = HERE / "out" / "figures.json"
    path.parent.mkdir(exist_ok=True)
    figures = json.loads(path.read_text()) if arguments.only else {}
    if arguments.only != "memory":
        figures["speed"] = command_output("speed.py", str(arguments.data))
    if arguments.only != "speed":
        figures["memory"] = measured_memory(arguments.data)
    path.write_text(json.dumps(figures))
    memory, speed = figures["memory"], figures["speed"]
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    versions |= {"numba": numba.__version__, "transformers": transformers.__version__}
    text = TEXT.format(
        machine=platform.machine(), cpu=torch.backends.cpu.get_cpu_capability(),
        versions=", ".join(f"{k} {v}" for k, v in versions.items()), goals=goals(memory, speed),
        large=memory_table(memory["large"]), small=memory_table(memory["small"]), speed=speed_table(speed),
        numbers="\n".join(f"| {k} | {v:.2f} |" for k, v in speed["generators"].items()),
        sums="\n".join(f"| {k} | {v:.2f} |" for k, v in speed["sums"].items()),
    )  # fmt: skip
    (HERE / "RESULT.md").write_text(text)


TEXT = """# Memory and speed of zeroth-order steps

Command: `python benchmarks/zeroth_order/run.py`. {machine} with {cpu}, shared cores, one thread; {versions}.

| goal | bar | measured | reached |
|---|---|---|---|
{goals}

## Peak memory

MB of resident memory less what the process held before the model, while two steps of 512 tokens are taken: a random
Llama of 125M parameters (hidden 768, 12 layers, vocabulary 32,000), LoRA of rank 8 on all linear layers. Inference is a
forward pass without labels that makes all logits and keeps no keys and values. "Live" is with
`MALLOC_MMAP_THRESHOLD_=1048576`, where freed memory goes back at once; "as it runs" is glibc's own way. With a bf16
base, LoRA's factors are float32 and computing is in autocast, as `tune` does it.

| job | batch | live | x inference | as it runs | x inference |
|---|---|---|---|---|---|
{large}

base6m (24 MB of weights, vocabulary 4,096), live. Ten MB here are what an allocator and a library's buffers make of it.

| job | batch | live | x inference |
|---|---|---|---|
{small}

## Steps per CPU-second

One row of 64 tokens, one thread, contenders in turn in one process. "Published" is the loop of MeZO (arXiv:2305.17333)
written from its description, with the model's own loss and without a cache of keys and values; the other lines are
`ZerothOrder` with `objective_of`, as `tune` uses them. Ratios are medians over turns. LoRA is of rank 8 on queries and
values.

{speed}

## Nanoseconds per number

| | ns |
|---|---|
{numbers}

CPU seconds of `accumulated` (a sum of K directions, float64, rounded once) for 49,152 weights:

| | s |
|---|---|
{sums}

## What was learned

- Drawing was nearly all of what the published loop adds to its two forward passes. With float32 numbers by Box and
  Muller, made in the first-level cache and added at once, keeping them is hardly worth its memory: `speed` gains little
  over `memory`, because numbers that are kept must be read from main memory.
- For a small adapter the two forward passes are nearly everything, in the published loop too: what it takes beyond two
  bare passes is the most that a step of two passes can gain. `speed` takes both sides in one pass of twice the rows,
  which is faster than two bare ones, at the price of twice the activations. `memory` keeps to two passes, and on the
  smaller model it does not reach 1.1 times the published loop, which is itself 1.12 times two bare passes.
- The loss takes no memory beyond the logits: they are read in pieces of 2**20. Keys and values are not cached.
- Square roots of torch on a CPU are not always the nearest float, since they go through a vector library. The reference
  takes float32 roots through float64, which is exact, and the kernels agree with it to the bit.
"""


if __name__ == "__main__":
    main()
