"""What a trial of a search costs beside its scoring: a merge in memory against a checkpoint. Writes OVERHEAD.md.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/glue/overhead.py [--models DIR] [--place DIR] [--only CASE ...]

A trial must get the weights of a candidate into a model. Either they are merged straight into the parameters of a live
model; or a merge is written and loaded: of that way only `save_pretrained` of the finished model and `load_model` of
the folder are timed here, in the same process, not the merge itself. Both keep the weights that fit in the page cache.
The 1.1 billion models are made in --place and removed afterwards.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from honeloom.backends.hf.live_weights import LiveWeights, Pool
from honeloom.backends.hf.load import load_model
from honeloom.merging.config import LinearConfig, TaskArithmeticConfig, TiesConfig
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.search.candidates import Candidate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "merging"))
from checkpoints import LARGE, write_family  # noqa: E402

BAR = 1 / 3
REPEATS = 5
METHODS = {"linear": LinearConfig(), "task_arithmetic": TaskArithmeticConfig(), "ties": TiesConfig(density=0.2)}


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition: wall, and CPU of the process."""

    wall: list[float]
    cpu: list[float]

    @property
    def best(self) -> float:
        return min(self.wall)


def timed(run: Callable[[int], None], repeats: int) -> Times:
    """Run a number of times after once for warmth."""
    run(0)
    found = Times([], [])
    for number in range(1, repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        run(number)
        found.wall.append(time.perf_counter() - wall)
        found.cpu.append(time.process_time() - cpu)
    return found


def candidates(models: int, repeats: int) -> list[Candidate]:
    """Weights that differ in every tensor from one to the next."""
    dice = np.random.default_rng(0)
    return [Candidate.of(dice.dirichlet(np.ones(models))[None, :]) for _ in range(repeats + 1)]


def live_times(folders: list[Path], method: str, repeats: int) -> Times:
    """Merges of all but the first model, which is the base, into a live model."""
    config = METHODS[method]
    base = str(folders[0]) if config.base == "needed" else None
    names = [str(f) for f in folders[1:]]
    trials = candidates(len(names), repeats)
    with ExitStack() as stack:
        sources = {n: stack.enter_context(ModelSource(n, Path(n))) for n in [str(folders[0]), *names]}
        sources = {n: s for n, s in sources.items() if n in names or n == base}
        live = LiveWeights(Pool(names, sources, base, config, {}))
        return timed(lambda number: live.fill(live.pool.document(trials[number])), repeats)


def checkpoint_times(folder: Path, place: Path, repeats: int) -> tuple[Times, Times]:
    """`save_pretrained` of a model in its stored type, and loading the result as every verb does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    saved = place / "saved"

    def save(_: int) -> None:
        model.save_pretrained(saved)

    def load(_: int) -> None:
        load_model(saved)

    return timed(save, repeats), timed(load, repeats)


def base6m(models: Path, place: Path) -> list[Path]:
    """The model, and four copies with noise, in its own type."""
    folders = [models / "base6m"]
    for seed in range(4):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.002 * torch.randn(parameter.shape)).to(parameter.dtype)
        folders.append(place / f"copy{seed}")
        model.save_pretrained(folders[-1])
    return folders


def measure(name: str, folders: list[Path], place: Path, repeats: int) -> list[dict[str, object]]:
    """Rows of the table for one family of models."""
    found = {}
    for method in METHODS:
        found[method] = live_times(folders, method, repeats)
        gc.collect()
    saved, loaded = checkpoint_times(folders[1], place, repeats)
    gc.collect()
    whole = saved.best + loaded.best
    return [
        {
            "models": name, "method": method, "live": t.best, "live_cpu": min(t.cpu), "save": saved.best,
            "load": loaded.best, "cpu": min(saved.cpu) + min(loaded.cpu), "ratio": t.best / whole,
        }
        for method, t in found.items()
    ]  # fmt: skip


def page(rows: list[dict[str, object]], load: float) -> str:
    """OVERHEAD.md."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    head = (
        "models", "method", "in memory, s", "CPU, s", "save_pretrained, s", "load_model, s", "CPU of both, s", "ratio"
    )  # fmt: skip
    about = (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}. A shared machine: the load was {load:.1f} when the run began."
    )
    lines = [
        "# Overhead of a trial", "",
        f"Command: `OMP_WAIT_POLICY=PASSIVE python benchmarks/glue/overhead.py`. {about}", "",
        "Getting the weights of a candidate into a model, without scoring it: merged into the parameters of a live",
        "model (bf16 files, fp32 in memory, every tensor changes), against writing and loading a finished checkpoint",
        "of the same size, the merge itself not counted. Shortest of several repetitions, files in the page cache.", "",
        "| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |",
    ]  # fmt: skip
    for r in rows:
        numbers = " | ".join(f"{r[k]:.3f}" for k in ("live", "live_cpu", "save", "load", "cpu"))
        lines.append(f"| {r['models']} | {r['method']} | {numbers} | {r['ratio']:.2f} |")
    over = [f"- {r['models']}, {r['method']}: {r['ratio']:.2f}." for r in rows if float(str(r["ratio"])) > BAR]
    lines += ["", f"Goal: at most {BAR:.2f} of writing and loading. Not reached by:", "", *(over or ["- none."]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE.parents[2] / "shared" / "data" / "models")
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()) / "honeloom-overhead")
    parser.add_argument("--only", nargs="*", default=["base6m", "large"], choices=("base6m", "large"))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    try:
        if "base6m" in given.only:
            folders = base6m(given.models, given.place / "small")
            rows += measure("base6m, 4 models", folders, given.place, given.repeats)
        if "large" in given.only:
            folders = write_family(given.place / "large", LARGE, 2)
            rows += measure("1.1 billion, 2 models", folders, given.place, max(1, given.repeats // 2))
    finally:
        shutil.rmtree(given.place, ignore_errors=True)
    text = page(rows, load)
    if given.only == ["base6m", "large"]:
        (HERE / "OVERHEAD.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
