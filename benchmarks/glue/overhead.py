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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

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


@dataclass
class Times:
    """Seconds of each repetition: wall, and CPU of the process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def take(self, run: Callable[[], object]) -> None:
        """One more repetition."""
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    models: str
    method: str
    live: Times
    save: Times
    load: Times

    def seconds(self, clock: str) -> list[float]:
        """Medians of the merge in memory, of saving and of loading."""
        return [median(getattr(times, clock)) for times in (self.live, self.save, self.load)]

    def ratio(self, clock: str) -> float:
        """Of the merge in memory to saving and loading."""
        live, save, load = self.seconds(clock)
        return live / (save + load)


def candidates(models: int, count: int) -> list[Candidate]:
    """Weights that differ in every tensor from one to the next."""
    dice = np.random.default_rng(0)
    return [Candidate.of(dice.dirichlet(np.ones(models))[None, :]) for _ in range(count)]


def measure(name: str, folders: list[Path], method: str, place: Path, repeats: int) -> Case:
    """Merges of all but the first model, which is the base, in turn with writing and loading one of them.

    `save_pretrained` is of a model in its stored type, and `load_model` is what every verb calls.
    """
    config, saved = METHODS[method], place / "saved"
    base = str(folders[0]) if config.base == "needed" else None
    names = [str(f) for f in folders[1:]]
    trials = candidates(len(names), repeats + 1)
    finished = AutoModelForCausalLM.from_pretrained(folders[1], dtype="auto")
    with ExitStack() as stack:
        sources = {n: stack.enter_context(ModelSource(n, Path(n))) for n in ([base] if base else []) + names}
        live = LiveWeights(Pool(names, sources, base, config, {}))
        for number, trial in enumerate(trials):
            if number <= 1:  # the first turn is for warmth
                case = Case(name, method, Times(), Times(), Times())
            case.live.take(lambda trial=trial: live.fill(live.pool.document(trial)))
            case.save.take(lambda: finished.save_pretrained(saved))
            case.load.take(lambda: load_model(saved))
    return case


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


def page(cases: list[Case], load: float) -> str:
    """OVERHEAD.md."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    head = (
        "models", "method", "in memory, s (CPU)", "save_pretrained, s (CPU)", "load_model, s (CPU)", "ratio", "of CPU"
    )  # fmt: skip
    about = (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}. A shared machine: the load was {load:.1f} when the run began, so that CPU times "
        "say more than the clock."
    )
    lines = [
        "# Overhead of a trial", "",
        f"Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/glue/overhead.py`. {about}", "",
        "Getting the weights of a candidate into a model, without scoring it: merged into the parameters of a live",
        "model (bf16 files, fp32 in memory, every tensor changes), against writing and loading a finished checkpoint",
        "of the same size, the merge itself not counted. The two take turns; medians, files in the page cache.", "",
        "| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |",
    ]  # fmt: skip
    for c in cases:
        pairs = zip(c.seconds("wall"), c.seconds("cpu"), strict=True)
        numbers = " | ".join(f"{wall:.3f} ({cpu:.3f})" for wall, cpu in pairs)
        lines.append(f"| {c.models} | {c.method} | {numbers} | {c.ratio('wall'):.2f} | {c.ratio('cpu'):.2f} |")
    over = [f"- {c.models}, {c.method}: {c.ratio('cpu'):.2f}." for c in cases if c.ratio("cpu") > BAR]
    lines += ["", f"Goal: at most {BAR:.2f} of writing and loading, in CPU time. Not reached by:", ""]
    return "\n".join([*lines, *(over or ["- none."]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE.parents[2] / "shared" / "data" / "models")
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()) / "honeloom-overhead")
    parser.add_argument("--only", nargs="*", default=["base6m", "large"], choices=("base6m", "large"))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    load, cases = os.getloadavg()[0], []
    logging.disable_progress_bar()
    try:
        if "base6m" in given.only:
            folders = base6m(given.models, given.place / "small")
            cases += [measure("base6m, 4 models", folders, m, given.place, 5 * given.repeats) for m in METHODS]
        if "large" in given.only:
            folders = write_family(given.place / "large", LARGE, 2)
            cases += [measure("1.1 billion, 2 models", folders, m, given.place, given.repeats) for m in METHODS]
    finally:
        shutil.rmtree(given.place, ignore_errors=True)
    text = page(cases, load)
    if given.only == ["base6m", "large"]:
        (HERE / "OVERHEAD.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
