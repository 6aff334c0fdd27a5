"""Find the planted wrong answers of the lab's pool by what gradients say, and write LAB.md.

    OMP_NUM_THREADS=1 python benchmarks/selection/lab.py

Row scores are compared with the known answers by ROC AUC: the chance that a wrong row scores below a right one.
The answers are used for nothing else.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from honeloom import lab
from honeloom.backends.hf.gradients import RowGradients
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.score import Scorer
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.in_run import in_run, row_batches
from honeloom.selection.influence import less, tracin
from honeloom.testing.fakes import FakeRows, chat_row
from honeloom.types.ports import SelectionData
from honeloom.types.rows import Row

Values = npt.NDArray[np.float64]
MARGIN, GOAL = 0.03, 0.9
EPOCHS, BATCH, LR, RANK = 3, 16, 5e-3, 8
WARM: dict[str, Any] = {"checkpoints": 4, "batch_size": BATCH, "rank": RANK}
LAB: dict[str, Any] = WARM | {"warmup": 1.0, "lr": LR, "target_rows": 480}
DEFAULT: dict[str, Any] = WARM | {"warmup": 0.05, "lr": 2e-4, "target_rows": 128}


def rows_of(split: Any) -> list[Row]:
    """The rows of a split as a selector sees them."""
    return [
        chat_row(r["id"], r["instruction"], r["output"], domain=r.get("domain"), source=r["source"])
        for r in lab.rows(split)
    ]


@dataclass
class Bench:
    """The pool, the target, the port, and what has been found: name -> (all rows, untaught rows) per seed."""

    pool: Sequence[Row]
    dev: Sequence[Row]
    port: RowGradients
    found: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def data(self, seed: int) -> SelectionData:
        """What a selector gets; the adapters are drawn once, all else follows the seed."""

        def no_model() -> Any:
            raise RuntimeError("these methods ask for gradients alone")

        return SelectionData(
            FakeRows(self.pool), no_model, seed, target=FakeRows(self.dev), open_gradients=lambda rank: self.port
        )

    def losses(self, places: Sequence[int]) -> Values:
        """Mean loss of rows under the port's model as it is."""
        scorer = Scorer(self.port.model, self.port.encoder, 64)
        return np.array([loss.mean for _, loss in scorer.losses([self.pool[i] for i in places])])

    def measure(self, name: str, seeds: Sequence[int], score: Callable[[int], Values]) -> None:
        """Score with every seed; note and print the areas. Higher scores are better rows."""
        known = lab.truth("pool")
        wrong = np.array([known[row.id]["wrong"] for row in self.pool])
        untaught = np.array([not known[row.id]["taught"] for row in self.pool])
        begin, areas = time.process_time(), []
        for seed in seeds:
            values = score(seed)
            areas.append(
                (float(roc_auc_score(wrong, -values)), float(roc_auc_score(wrong[untaught], -values[untaught])))
            )
        self.found[name], self.seconds[name] = areas, (time.process_time() - begin) / len(seeds)
        print(f"{name}: {areas}, {self.seconds[name]:.0f} CPU s", flush=True)


def two_fold(bench: Bench, seed: int) -> Values:
    """Minus the loss of every row under a model that was tuned on the other half of the pool."""
    values = np.zeros(len(bench.pool))
    ids = [row.id for row in bench.pool]
    order = np.argsort(keyed_uniform(seed, "benchmark/halves", ids)).tolist()
    halves = [order[0::2], order[1::2]]
    for mine, other in (halves, halves[::-1]):
        bench.port.reset()
        steps = row_batches([ids[i] for i in other], 2 * EPOCHS, BATCH, seed)
        for step, batch in enumerate(steps):
            bench.port.train([bench.pool[other[i]] for i in batch], lr=LR * (1 - step / len(steps)))
        values[mine] = -bench.losses(mine)
    return values


def measure_all(bench: Bench, seeds: Sequence[int], *, more: bool) -> None:
    """Baselines, then the methods with the lab's settings; `more`: the paper's mode of `less`, and the defaults."""
    every = list(range(len(bench.pool)))
    bench.port.reset()
    bench.measure("loss under the base", seeds[:1], lambda seed: -bench.losses(every))
    bench.measure("loss, two-fold", seeds, lambda seed: two_fold(bench, seed))

    def run(name: str, method: Callable[..., Any], seeds: Sequence[int], settings: dict[str, Any]) -> None:
        bench.measure(name, seeds, lambda seed: np.array(method(bench.data(seed), **settings).value))

    run("less", less, seeds, LAB | {"size": 2048, "mode": "standard"})
    tuning = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "rank": RANK, "target_rows": 128}
    run("in_run", in_run, seeds[:1], tuning)
    run("tracin", tracin, seeds[:1], LAB)
    if not more:
        return
    run("less, mode less-paper", less, seeds[:1], LAB | {"size": 2048, "mode": "less-paper"})
    run("less, defaults", less, seeds[:1], DEFAULT | {"size": 8192, "mode": "standard"})
    run("in_run, defaults", in_run, seeds[:1], tuning | {"epochs": 1, "lr": 2e-4})


def measure_fall(bench: Bench) -> list[str]:
    """How far in-run values, summed, miss the true fall of the target's loss."""
    lines, target = [], bench.dev[:64]
    for lr in (2e-4, 1e-3, LR):
        small = replace_target(bench, target)
        small.port.reset()
        before = mean_loss(small, target)
        values = in_run(small.data(0), epochs=1, batch_size=BATCH, lr=lr, rank=RANK, target_rows=len(target)).value
        lines.append(f"| {lr:g} | {sum(values):.4f} | {before - mean_loss(small, target):.4f} |")
        print(lines[-1], flush=True)
    return lines


def replace_target(bench: Bench, target: Sequence[Row]) -> Bench:
    """The same with 320 rows of the pool and another target."""
    return replace(bench, pool=bench.pool[:320], dev=target)


def mean_loss(bench: Bench, rows: Sequence[Row]) -> float:
    """Mean over rows of their mean loss."""
    return mean(loss.mean for _, loss in Scorer(bench.port.model, bench.port.encoder, 64).losses(rows))


NOTES = """\
The pool has 2,400 rows, 1,688 of them of untaught ops (those between domains included); 731 answers are wrong, 510 of
them on untaught rows. The target is `lab:dev` (clean, labelled by domain), the model `lab:base`. Row scores are
compared with the planted answers by ROC AUC; the answers choose no row and no score. The standard mode of `less` was
chosen by looking at seed 0; the other seed was not looked at before. Lab settings: LoRA of rank 8, lr 5e-3, batches of
16; `less` and `tracin` warm up on the whole pool over four passes and see all 480 target rows, `in_run` goes through
the pool three times with 128. The two-fold loss tunes the same adapters at the same rate, six passes over one half, and
scores the other half. The defaults (lr 2e-4, warm-up on 5 %) are meant for real models.
"""

CAUSES = """\
- Where the bar or the goal is missed by `less`, it is by 0.001 to 0.003, less than its two seeds differ (0.025); more
  seeds are needed to tell.
- `in_run` and `tracin` stay below the two-fold loss as finders of wrong rows. Both sum products with the target's mean
  gradient. While the model still learns the form of the answers, a wrong row teaches it as well as a right one, and
  these early steps have the largest products. That is what the methods measure (the fall of the target's loss, above),
  and it is not whether an answer is right. Adam's scale and sharing out each step's mean raised `in_run` from 0.61 on
  all rows to the figure above.
- Sums over checkpoints, as in the paper's `less`, are led by those at a high rate, where the target's gradient points
  back along the last steps. With the same warm-up, the mean cosine at each of the four checkpoints alone gave 0.69,
  0.65, 0.92 and 0.92 on all rows, and its sum weighted by rate 0.76 (seed 0).
- The default settings, and the mode less-paper with this benchmark's settings, have not been measured here; `--more`
  adds both. At the base itself, which a rate of 2e-4 leaves slowly, gradients say little about wrong answers: the mean
  dot product and cosine with the target gave 0.48 to 0.58 on all rows.
"""


def section(bench: Bench, fall: Sequence[str], seconds: float) -> str:
    """The figures as Markdown."""
    means = {name: tuple(mean(a[k] for a in areas) for k in (0, 1)) for name, areas in bench.found.items()}
    bar = means["loss, two-fold"]
    surrogates = {name: m for name, m in means.items() if not name.startswith("loss")}
    best = max(surrogates, key=lambda name: surrogates[name][1])
    gains = [surrogates[best][k] - bar[k] for k in (0, 1)]
    lines = [
        "# Finding wrong rows of the lab's pool by gradients",
        "",
        "Command: `OMP_NUM_THREADS=1 python benchmarks/selection/lab.py`",
        "",
        f"Measured on {platform.machine()} with torch {torch.__version__.partition('+')[0]}, one thread,"
        f" {seconds:.0f} CPU s.",
        "",
        NOTES,
        "| score | all rows | untaught rows | seeds (all / untaught) | CPU s |",
        "|---|---|---|---|---|",
    ]
    for name, areas in bench.found.items():
        seen = ", ".join(f"{a:.3f} / {u:.3f}" for a, u in areas)
        lines.append(f"| {name} | {means[name][0]:.3f} | {means[name][1]:.3f} | {seen} | {bench.seconds[name]:.0f} |")
    lines += [
        "",
        f"Bar: the best surrogate at least {MARGIN} above the two-fold loss. Best: `{best}`, {gains[0]:+.3f} on all"
        f" rows and {gains[1]:+.3f} on untaught ones: {'met' if gains[1] >= MARGIN else '**not met**'} on these,"
        f" {'met' if gains[0] >= MARGIN else '**not met**'} on all."
        f" Goal {GOAL}: {surrogates[best][0]:.3f} on all rows, {surrogates[best][1]:.3f} on untaught ones.",
        "",
        "Do in-run values add up to what they claim? One pass over 320 rows towards 64 rows of dev, in nats per token:",
        "",
        "| lr | sum of the values | true fall of the target's loss |",
        "|---|---|---|",
        *fall,
        "",
        "## Not reached",
        "",
        CAUSES,
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure everything, print it, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=Path(__file__).with_name("LAB.md"), help="file to write")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds")
    parser.add_argument("--more", action="store_true", help="also the paper's mode of less, and the default settings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    port = RowGradients.open(lab.base_path(), loading=Loading("cpu", "fp32", attn="eager"), rank=RANK, batch_size=64)
    bench = Bench(rows_of("pool"), rows_of("dev"), port)
    fall = measure_fall(bench)
    measure_all(bench, range(arguments.seeds), more=arguments.more)
    arguments.result.write_text(section(bench, fall, time.process_time()), encoding="utf-8")


if __name__ == "__main__":
    main()
