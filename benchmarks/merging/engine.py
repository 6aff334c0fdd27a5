"""Time and memory of merges of 1.1 billion parameters: honeloom, mergekit, and plain copies. Writes ENGINE.md.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/merging/engine.py [--env DIR] [--only CASE ...] [--again]

Each run is a process of its own on the same files, which are read into the page cache before it; the programs take
turns, and each repetition begins with another one. Runs are kept in out/engine/; --again does those of --only anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pages
import rival
from checkpoints import PLACE, large, many
from measured import GIB, measured

OUT = pages.HERE / "out" / "engine"
PROGRAMS = ("copies", "honeloom", "mergekit")
SHARDS = "mergekit, 500 MB shards"
COUNTS = (5_000, 20_000, 50_000)
Run = dict[str, Any]
Runs = dict[str, list[Run]]
FREE: dict[str, str | None] = {**rival.OFFLINE, "OMP_NUM_THREADS": None}
"""Every program chooses its number of threads itself."""
WALL_LINEAR, RSS_LINEAR, OVER_COPIES, CPU_TIES, RSS_TIES, GROWTH = 0.7, 0.6, 1.3, 1 / 8, 0.8, 1.3


@dataclass(frozen=True)
class Case:
    """A merge of the large models: what of each fine-tune, and of all."""

    method: str
    tunes: int = 4
    base: bool = True
    own: Mapping[str, float] | None = None
    weights: tuple[float, ...] = ()
    shared: Mapping[str, Any] | None = None

    def inputs(self, folders: Sequence[Path]) -> list[Path]:
        """Folders that it reads."""
        return list(folders[0 if self.base else 1 : self.tunes + 1])

    def config(self, folders: Sequence[Path]) -> dict[str, Any]:
        """mergekit's YAML."""
        config: dict[str, Any] = {"merge_method": self.method, "dtype": "bfloat16", "compat": "mergekit"}
        if self.base:
            config["base_model"] = str(folders[0].absolute())
        if self.shared:
            config["parameters"] = dict(self.shared)
        config["models"] = []
        for i in range(1, self.tunes + 1):
            parameters = {**({"weight": self.weights[i - 1]} if self.weights else {}), **(self.own or {})}
            config["models"].append(
                {"model": str(folders[i].absolute()), **({"parameters": parameters} if parameters else {})}
            )
        return config


_FOUR = (0.4, 0.3, 0.2, 0.1)
CASES = {
    "linear of 4": Case("linear", base=False, weights=_FOUR),
    "task_arithmetic, base + 4": Case("task_arithmetic", weights=_FOUR),
    "slerp of 2": Case("slerp", tunes=1, shared={"t": 0.4}),
    "ties, base + 4, density .5": Case("ties", weights=_FOUR, own={"density": 0.5}),
    "dare_ties, base + 4, density .5": Case("dare_ties", weights=_FOUR, own={"density": 0.5}),
    "model_stock, base + 4": Case("model_stock"),
    "della, base + 4, density .5": Case("della", weights=_FOUR, own={"density": 0.5, "epsilon": 0.1}),
}
LINEAR, TIES = "linear of 4", "ties, base + 4, density .5"
TENSORS = {f"{count:,} tensors": count for count in COUNTS}


def run(program: str, config: Path, inputs: Sequence[Path], env: Path) -> Run:
    """Measure one program on one merge, its output removed afterwards."""
    weights = [folder / "model.safetensors" for folder in inputs]
    out, log = OUT / "work", OUT / "log.txt"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    warm(weights)
    load = os.getloadavg()[0]
    usage = measured(_command(program, config, out / "merged", weights, env), log, FREE)
    if usage.status:
        raise SystemExit(f"{program} on {config} ended with status {usage.status}: see {log}")
    more = json.loads(log.read_text()) if program == "copies" else {"phases": phases(out / "merged")}
    shutil.rmtree(out)
    os.sync()
    return {**asdict(usage), **more, "load": load}


def _command(program: str, config: Path, out: Path, weights: Sequence[Path], env: Path) -> list[str]:
    if program == "copies":
        return [sys.executable, str(pages.HERE / "copies.py"), str(out), *map(str, weights)]
    if program == "honeloom":
        return [str(Path(sys.executable).parent / "honeloom"), "merge", str(config), str(out), "--overwrite"]
    return rival.command(env, config, out, ("--out-shard-size", "500M") if program == SHARDS else ())


def warm(paths: Sequence[Path]) -> None:
    """Read files into the page cache, as far as it holds them."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def phases(out: Path) -> dict[str, float]:
    """Seconds of the merge itself and of the verification, from the command's own events."""
    events = out / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    names = {"written": "merge", "verified": "verify"}
    return {names[e["event"]]: float(e["took"]) for e in lines if e["event"] in names}


def kept(name: str, program: str, repetition: int, work: Callable[[], Run], again: bool) -> Run:
    """A run from out/engine/, or a new one."""
    path = OUT / f"{name}.{program}.{repetition}.json".replace(", ", "-").replace(" ", "_")
    if again or not path.exists():
        found = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")
        print(name, program, repetition, f"{found['wall']:.1f} s, {found['rss'] / GIB:.2f} GiB", flush=True)
    result: Run = json.loads(path.read_text())
    return result


def measure(name: str, given: argparse.Namespace) -> Runs:
    """All repetitions of one case, by program."""
    if name in CASES:
        folders, programs = large(PLACE), (*PROGRAMS, *([SHARDS] if name == LINEAR else []))
        inputs, config = CASES[name].inputs(folders), CASES[name].config(folders)
    else:
        inputs = many(PLACE, TENSORS[name])
        programs = PROGRAMS[1:] if TENSORS[name] == COUNTS[0] else PROGRAMS[1:2]
        config = Case("linear", tunes=2, base=False, weights=(0.6, 0.4)).config([inputs[0], *inputs])
    path = rival.write_config(OUT / "configs" / f"{config['merge_method']}-{inputs[0].parent.name}.yaml", config)
    found: Runs = {program: [] for program in programs}
    for repetition in range(given.repetitions):
        start = repetition % len(programs)
        for program in programs[start:] + programs[:start]:
            work = partial(run, program, path, inputs, given.env)
            found[program].append(kept(name, program, repetition, work, given.again))
    return found


def middle(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    """Median of something over repetitions."""
    return statistics.median(map(value, runs))


def ratio(found: Runs, value: Callable[[Run], float], other: Callable[[Run], float], program: str) -> float:
    """Median over repetitions of something of honeloom's to something of another program's in the same repetition."""
    return statistics.median(value(a) / other(b) for a, b in zip(found["honeloom"], found[program], strict=True))


def wall(run: Run) -> float:
    """Seconds."""
    return float(run["wall"])


def cpu(run: Run) -> float:
    """Seconds of user and system time."""
    return float(run["user"] + run["system"])


def rss(run: Run) -> float:
    """Peak GiB."""
    return float(run["rss"] / GIB)


def anonymous(run: Run) -> float:
    """Peak GiB that no file backs."""
    return float(run["anonymous"] / GIB)


def disk(run: Run) -> float:
    """GiB that the page cache did not hold any more."""
    return float(run["read"] / GIB)


def merging(run: Run) -> float:
    """Seconds of honeloom's engine alone; of the whole command if it names no phases."""
    return float(run["phases"].get("merge", run["wall"]))


def durable(run: Run) -> float:
    """Seconds of copies until they are on the disk."""
    return float(run["durable"])


def case_rows(found: Mapping[str, Runs]) -> Iterator[tuple[str, ...]]:
    """Of the main table."""
    for name, programs in found.items():
        beside = {"honeloom": f"{ratio(programs, wall, wall, 'mergekit'):.2f}"}
        for program, runs in programs.items():
            yield (
                name, program, f"{middle(runs, wall):.1f}", beside.get(program, ""), f"{middle(runs, cpu):.1f}",
                f"{middle(runs, rss):.2f}", f"{middle(runs, anonymous):.2f}",
                f"{middle(runs, disk):.2f}", f"{max(r['load'] for r in runs):.1f}",
            )  # fmt: skip


def phase_rows(found: Mapping[str, Runs]) -> Iterator[tuple[str, ...]]:
    """Of the table of honeloom's phases."""
    for name, programs in found.items():
        runs, copies = programs["honeloom"], programs["copies"]
        parts = [f"{phase} {statistics.median(r['phases'][phase] for r in runs):.1f}" for phase in runs[0]["phases"]]
        yield (
            name, ", ".join(parts), f"{statistics.median(r['copied'] for r in copies):.1f}",
            f"{middle(copies, durable):.1f}", f"{ratio(programs, merging, durable, 'copies'):.2f}",
        )  # fmt: skip


def slope(found: Mapping[str, Runs], low: int, high: int) -> float:
    """Seconds of honeloom's merging per thousand more tensors."""
    less, more = (middle(found[f"{count:,} tensors"]["honeloom"], merging) for count in (low, high))
    return (more - less) / (high - low) * 1000


def growth_rows(found: Mapping[str, Runs]) -> Iterator[tuple[str, ...]]:
    """Of the table of many tensors."""
    for name, programs in found.items():
        for program, runs in programs.items():
            yield (name, program, f"{middle(runs, wall):.1f}", f"{middle(runs, cpu):.1f}", f"{middle(runs, rss):.2f}")


def goals(found: Mapping[str, Runs], growth: Mapping[str, Runs]) -> list[pages.Goal]:
    """What was to be reached."""
    linear, ties = found[LINEAR], found[TIES]
    over = ratio(linear, merging, durable, "copies")
    steps = slope(growth, *COUNTS[1:]) / slope(growth, *COUNTS[:2])
    limits = (
        ("linear: wall time, of mergekit's", ratio(linear, wall, wall, "mergekit"), WALL_LINEAR),
        ("linear: peak resident memory, GiB", middle(linear["honeloom"], rss), RSS_LINEAR),
        ("linear: time of merging, of plain copies on disk", over, OVER_COPIES),
        ("ties: CPU time, of mergekit's", ratio(ties, cpu, cpu, "mergekit"), CPU_TIES),
        ("ties: peak resident memory, GiB", middle(ties["honeloom"], rss), RSS_TIES),
        (f"time of merging per further tensor beyond {COUNTS[1]:,}, of that below", steps, GROWTH),
    )
    return [pages.Goal(f"{claim}: at most {limit:g}", f"{value:.3g}", value <= limit) for claim, value, limit in limits]


def page(found: Mapping[str, Runs], growth: Mapping[str, Runs], given: argparse.Namespace) -> list[str]:
    """The result as Markdown."""
    where = pages.machine(rival.versions(given.env))
    return [
        "# Time and memory of merges", "",
        f"Command: `OMP_WAIT_POLICY=PASSIVE python benchmarks/merging/engine.py`. {where} A shared machine: the last "
        "column is the highest load when a run began.", "",
        "Synthetic Llamas of 1.1 billion parameters in bf16, 2.2 GB each. honeloom and mergekit get the same YAML and",
        "files, which are in the page cache; each is a process of its own, measured with all its children every 50 ms.",
        "honeloom's command also takes fingerprints of inputs and output, flushes the output to the disk, probes the",
        "result and every parent, and recomputes samples; mergekit's does none of that. Resident memory includes",
        "mapped files.",
        f"{'One run of each' if given.repetitions == 1 else f'Medians of {given.repetitions} repetitions'}; ratios are "
        "within a repetition.", "",
        *pages.table(
            ("merge", "program", "wall, s", "of mergekit's", "CPU, s", "peak resident, GiB", "anonymous, GiB",
             "read from disk, GiB", "load"),
            case_rows(found),
        ), "",
        "## Phases of honeloom, and plain copies", "",
        "Copies read every input in pieces of 8 MiB and write one output; the second number: until it is on disk.", "",
        *pages.table(
            ("merge", "phases, s", "copies, s", "on disk, s", "merging, of copies on disk"), phase_rows(found)
        ), "",
        "## Many tensors", "",
        "Linear of two Llamas of many layers, a few hundred numbers per tensor.", "",
        *pages.table(("about", "program", "wall, s", "CPU, s", "peak resident, GiB"), growth_rows(growth)), "",
        f"honeloom's merging per thousand further tensors: {slope(growth, *COUNTS[:2]):.2f} s from {COUNTS[0]:,} to "
        f"{COUNTS[1]:,}, {slope(growth, *COUNTS[1:]):.2f} s from there to {COUNTS[2]:,}. The rest of these runs is the "
        "check of the result: transformers takes that long to build a model of thousands of layers, three times, and "
        "more than in proportion to them.", "",
        "## Goals", "", *pages.goals(goals(found, growth)), *_causes(found),
    ]  # fmt: skip


def _causes(found: Mapping[str, Runs]) -> Iterator[str]:
    """Why the wall time of a linear merge is above the goal, if it is."""
    share = ratio(found[LINEAR], wall, wall, "mergekit")
    if share > WALL_LINEAR:
        engine = ratio(found[LINEAR], merging, wall, "mergekit")
        yield (
            f"The merge itself takes {engine:.2f} of mergekit's wall time. The rest of the command is start-up, "
            "SHA-256 of 8.8 GB of inputs and 2.2 GB of output, and a probe of the result and its four parents, which "
            "the command promises and mergekit does not do. mergekit 0.1.5 is also faster than the version that the "
            "goal was set by, and faster still with shards of 500 MB.\n"
        )
    left = [name for name in CASES if name not in found]
    if left:
        yield f"Not measured side by side yet: {'; '.join(left)}.\n"


def _measured(name: str) -> bool:
    """Whether all programs have run a case."""
    start = name.replace(", ", "-").replace(" ", "_")
    return len(list(OUT.glob(f"{start}.*.0.json"))) >= (3 if name in CASES else 1 + (TENSORS[name] == COUNTS[0]))


def main() -> None:
    """Measure what is missing; write the page once everything is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=rival.ENVIRONMENT)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=[*CASES, *TENSORS])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--cached", action="store_true", help="the page of the cases that have been measured")
    given = parser.parse_args()
    rival.make(given.env)
    names = given.only or [name for name in (*CASES, *TENSORS) if not given.cached or _measured(name)]
    found = {name: measure(name, given) for name in names}
    if given.only:
        return
    growth = {name: found.pop(name) for name in TENSORS}
    pages.write("ENGINE.md", page(found, growth, given))
    sys.exit(not all(goal.reached for goal in goals(found, growth)))


if __name__ == "__main__":
    main()
