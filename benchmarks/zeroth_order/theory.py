"""Steps to a target on quadratics, by dimension and by effective rank; writes THEORY.md.

    OMP_NUM_THREADS=1 python benchmarks/zeroth_order/theory.py

takes some minutes on one core. The learning rate is the one that `honeloom.tuning.curvature` chooses from forward
passes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from honeloom.tuning.curvature import SAFETY, estimate
from honeloom.tuning.zeroth_order import ZerothOrder

TARGET = 0.2
"""Share of the first loss at which a run ends."""
DIMENSIONS, RANKS, SEEDS = (100, 1_000, 10_000), (5, 10, 20, 40), 32


@dataclass(frozen=True)
class Quadratic:
    """Half of theta' U diag(eigenvalues) U' theta with U of orthonormal columns, and where to begin.

    Attributes
    ----------
    basis : ndarray
        U, shape (d, k).
    eigenvalues : ndarray
        Shape (k,), over 0; all others are 0.
    """

    basis: np.ndarray
    eigenvalues: np.ndarray

    def start(self) -> torch.Tensor:
        """A point at which every direction of curvature has the same loss, 1 in all; float32."""
        share = np.sqrt(2 / len(self.eigenvalues) / self.eigenvalues)
        return torch.from_numpy(self.basis @ share).float()

    def loss(self, point: torch.Tensor) -> float:
        """The loss, in double precision."""
        return 0.5 * float(self.eigenvalues @ (point.double().numpy() @ self.basis) ** 2)


def quadratic(eigenvalues: Sequence[float], dimension: int, seed: int = 0) -> Quadratic:
    """A quadratic of these eigenvalues in a random basis; the others of `dimension` are 0."""
    draw = np.random.default_rng(seed).standard_normal((dimension, len(eigenvalues)))
    return Quadratic(np.linalg.qr(draw)[0], np.array(eigenvalues, float))


def flat(rank: int) -> list[float]:
    """`rank` equal eigenvalues."""
    return [1.0] * rank


def decaying(rank: int) -> list[float]:
    """The first 2 `rank` eigenvalues 1, q, q^2 and so on, with the q for which they add up to `rank`."""
    low, high = 0.5, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        low, high = (ratio, high) if sum(ratio**k for k in range(2 * rank)) < rank else (low, ratio)
    return [low**k for k in range(2 * rank)]


def steps_to_target(problem: Quadratic, seed: int, limit: int = 20_000) -> int:
    """Steps until the loss is `TARGET` of the first, at the rate chosen from forward passes."""
    params = {"w": problem.start()}

    def loss() -> float:
        return problem.loss(params["w"])

    rate = estimate([loss, loss], params, seed=seed).rate()
    stepper, goal = ZerothOrder(params, kind="rademacher"), TARGET * loss()
    for step in range(limit):
        if loss() <= goal:
            return step
        stepper.step(loss, [seed * limit + step], rate)
    raise RuntimeError(f"no end within {limit} steps")


def mean_steps(eigenvalues: Sequence[float], dimension: int, seeds: int = SEEDS) -> tuple[float, float]:
    """Mean over seeds, each with a basis and directions of its own, and its standard error."""
    found = [steps_to_target(quadratic(eigenvalues, dimension, seed), seed) for seed in range(seeds)]
    return statistics.mean(found), statistics.stdev(found) / math.sqrt(seeds)


def line(ranks: Sequence[float], steps: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the straight line through the means."""
    slope, intercept = np.polyfit(ranks, steps, 1)
    return float(slope), float(intercept), float(np.corrcoef(ranks, steps)[0, 1] ** 2)


def report(seeds: int) -> str:
    """The whole of THEORY.md."""
    begun = time.perf_counter()
    shapes = {"10 equal eigenvalues": flat(10), "20 decaying ones, effective rank 10": decaying(10)}
    lines = [
        "# Steps follow the effective rank, not the number of parameters\n",
        f"Zeroth-order steps (one direction of signs) on quadratics in random bases until the loss is {TARGET} of the "
        f"first, at the learning rate that `honeloom.tuning.curvature` chooses from forward passes; means of {seeds} "
        "seeds ± standard error.\n",
        "| spectrum | " + " | ".join(f"d = {d:,}" for d in DIMENSIONS) + " | largest / smallest |",
        "|---|" + "---|" * (len(DIMENSIONS) + 1),
    ]
    for name, spectrum in shapes.items():
        found = [mean_steps(spectrum, d, seeds) for d in DIMENSIONS]
        means = [mean for mean, _ in found]
        cells = " | ".join(f"{mean:.1f} ± {error:.1f}" for mean, error in found)
        lines.append(f"| {name} | {cells} | {max(means) / min(means):.2f} |")
    ranks = [mean_steps(flat(rank), 1_000, seeds) for rank in RANKS]
    slope, intercept, fit = line(RANKS, [mean for mean, _ in ranks])
    lines += [
        "\n| effective rank (equal eigenvalues, d = 1,000) | steps | steps / rank |",
        "|---|---|---|",
        *(f"| {r} | {m:.1f} ± {e:.1f} | {m / r:.2f} |" for r, (m, e) in zip(RANKS, ranks, strict=True)),
        f"\nStraight line: {slope:.2f} steps per unit of rank, {intercept:+.1f}; R² = {fit:.4f}. "
        f"Without noise in the rate it would be {theory():.2f} per unit.",
        f"\nMeasured in {time.perf_counter() - begun:.0f} s on one core; torch {torch.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def theory() -> float:
    """Steps per unit of rank: a step takes (1 - (1 - SAFETY / 2) 2 SAFETY / scale) of the loss in the mean."""
    return -math.log(TARGET) / (2 * SAFETY * (1 - SAFETY / 2))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    text = report(parser.parse_args().seeds)
    Path(__file__).with_name("THEORY.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
