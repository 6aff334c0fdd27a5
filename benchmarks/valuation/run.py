"""Estimators at equal budget on three games with known values; writes RESULT.md.

    OMP_NUM_THREADS=1 python benchmarks/valuation/run.py

takes some minutes on one core. Figures are Spearman correlations with the exact Shapley values.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from shed import shed

from honeloom.ops import noise
from honeloom.registry import family
from honeloom.testing.games import Game, Noisy, additive, benchmark_game
from honeloom.types.plans import Scores
from honeloom.valuation import estimate
from honeloom.valuation.stopping import spearman

PLAYERS, EVALUATIONS, GROUP = 300, 1000, 6
KINDS = ("additive", "pairwise", "saturating")
NOISES = (0.0, 0.005, 0.015)
REACH, REACH_NOISE = 0.7, 0.005
METHODS: dict[str, Any] = {
    "auto": "auto",
    "banzhaf": "banzhaf",
    "ridge": {"type": "regression", "design": "bernoulli"},
    "paired ridge": {"type": "regression", "design": "bernoulli", "paired": True},
    "half ridge": "regression",
    "kernel_shap": "kernel_shap",
    "permutation": "permutation",
    "antithetic": "antithetic",
    "truncated": "truncated",
    "group_permutation": {"type": "group_permutation", "group_size": GROUP},
    "leave_one_out": "leave_one_out",
}
RIVALS = ("banzhaf", "ridge", "paired ridge", "permutation", "group_permutation", "shed-paper")
"""What `auto` must reach; shed stands there both as built and as in the paper."""


@dataclass
class Result:
    """Lines of RESULT.md, and the bars that were missed."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Keep and print."""
        self.lines.append(text)
        print(text, flush=True)

    def bar(self, claim: str, passed: bool) -> str:
        """Note a missed bar; return the word for a table."""
        if not passed:
            self.missed.append(claim)
        return "yes" if passed else "**no**"


def quality(scores: Scores, game: Game) -> float:
    """Spearman with the truth."""
    assert game.shapley is not None
    return spearman(np.array(scores.value), game.shapley)


def run_shed(game: Game, sd: float, seed: int, *, release: bool, budget: int = EVALUATIONS) -> list[tuple[int, float]]:
    """(evaluations, Spearman) after every permutation within the budget."""
    assert game.shapley is not None
    noisy = Noisy(game, sd, seed)
    steps = shed(noisy.evaluate, PLAYERS, GROUP, budget // (PLAYERS // GROUP), seed, release=release)
    return [(spent, spearman(values, game.shapley)) for spent, values in steps if spent <= budget]


def compare(result: Result, seeds: Sequence[int]) -> None:
    """All methods, games and noises at one budget."""
    names = [*METHODS, "shed-paper", "shed-release"]
    result.add(f"| game | noise sd | {' | '.join(names)} | best rival | auto reaches it less 0.02 |")
    result.add("|" + "---|" * (len(names) + 4))
    for kind in KINDS:
        for sd in NOISES:
            means = {name: float(np.mean([_one(name, kind, sd, s) for s in seeds])) for name in names}
            rival = max(RIVALS, key=lambda name: means[name])
            passed = means["auto"] >= means[rival] - 0.02
            word = result.bar(f"{kind}, noise {sd}: auto {means['auto']:.3f}, {rival} {means[rival]:.3f}", passed)
            cells = " | ".join(f"{means[name]:.3f}" for name in names)
            result.add(f"| {kind} | {sd} | {cells} | {rival} {means[rival]:.3f} | {word} |")


def _one(name: str, kind: Any, sd: float, seed: int) -> float:
    game = benchmark_game(kind, PLAYERS, seed)
    if name.startswith("shed-"):
        return run_shed(game, sd, seed, release=name == "shed-release")[-1][1]
    utility = Noisy(game, sd, seed) if sd else game
    return quality(estimate(utility, PLAYERS, method=METHODS[name], budget=EVALUATIONS, seed=seed), game)


def reach(result: Result, seeds: Sequence[int]) -> None:
    """Evaluations until the mean Spearman is 0.7."""
    result.add(f"| game | auto | shed-paper | ratio | at least 5 |\n|{'---|' * 5}")
    for kind in KINDS:
        games = [benchmark_game(kind, PLAYERS, s) for s in seeds]

        def auto(budget: int, games: Sequence[Game] = games) -> float:
            found = [
                quality(estimate(Noisy(g, REACH_NOISE, s), PLAYERS, budget=budget, seed=s), g)
                for g, s in zip(games, seeds, strict=True)
            ]
            return float(np.mean(found))

        ours = _first_reaching(auto, start=100)
        theirs = _shed_reaching(games, seeds, most=40_000)
        ratio = (theirs or 40_000) / ours
        word = result.bar(f"{kind}: {ratio:.1f} times fewer evaluations than shed-paper", ratio >= 5)
        shown = f"{theirs}" if theirs else "> 40000"
        result.add(f"| {kind} | {ours} | {shown} | {ratio:.1f} | {word} |")


def _first_reaching(mean: Callable[[int], float], start: int) -> int:
    """Smallest budget in steps of 5% whose mean reaches the goal."""
    budget = start
    while mean(budget) < REACH:
        budget = int(budget * 1.05) + 1
    return budget


def _shed_reaching(games: Sequence[Game], seeds: Sequence[int], most: int) -> int | None:
    budget = 5_000
    while budget <= most:
        runs = [run_shed(g, REACH_NOISE, s, release=False, budget=budget) for g, s in zip(games, seeds, strict=True)]
        for at in zip(*runs, strict=True):
            if np.mean([rho for _, rho in at]) >= REACH:
                return at[0][0]
        budget *= 2
    return None


def with_surrogate(result: Result, seeds: Sequence[int]) -> None:
    """Three players for every evaluation, and cheap values correlated 0.7 with the true ones."""
    n, found = 3000, {"control_variate": [], "regression": [], "surrogate": []}  # type: dict[str, list[float]]
    for seed in seeds:
        values = noise.normal(seed, "surrogate/values", n).double().numpy()
        other = noise.normal(seed, "surrogate/other", n).double().numpy()
        surrogate = 0.7 * values + np.sqrt(1 - 0.7**2) * other
        game = additive(0.15 / n * (1 + values), empty=0.3)
        found["surrogate"].append(spearman(surrogate, values))
        scores = estimate(game, n, budget=EVALUATIONS, seed=seed, surrogate=surrogate.tolist())
        found["control_variate"].append(quality(scores, game))
        found["regression"].append(quality(estimate(game, n, method="regression", budget=EVALUATIONS, seed=seed), game))
    mean = {name: float(np.mean(v)) for name, v in found.items()}
    word = result.bar(f"control variate {mean['control_variate']:.3f}", mean["control_variate"] >= 0.75)
    result.add(
        f"Mean Spearman of {len(seeds)} seeds: control_variate {mean['control_variate']:.3f} (bar 0.75 met: {word}), "
        f"the surrogate alone {mean['surrogate']:.3f}, regression without it {mean['regression']:.3f}."
    )


def resolved(result: Result) -> None:
    """What the noise report says beforehand, and what came true."""
    result.add(f"| noise sd | measured sd | predicted correlation | Spearman reached |\n|{'---|' * 4}")
    for sd in NOISES:
        game = benchmark_game("additive", PLAYERS, 0)
        scores = estimate(Noisy(game, sd, 0), PLAYERS, budget=EVALUATIONS)
        assert scores.noise is not None
        result.add(f"| {sd} | {scores.noise.sd:.4f} | {scores.noise.predicted_rho:.2f} | {quality(scores, game):.2f} |")


def main() -> None:
    """Measure everything and write RESULT.md beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RESULT.md"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="not resolvable")
    family("valuation")
    seeds, started, result = range(arguments.seeds), time.process_time(), Result()
    result.add("# Values of players at equal cost\n\nCommand: `OMP_NUM_THREADS=1 python benchmarks/valuation/run.py`\n")
    result.add(
        f"The games are `honeloom.testing.games.benchmark_game`: {PLAYERS} players, v(empty) 0.3, gain about 0.15. "
        f"Spearman with the exact Shapley values, mean of {len(seeds)} seeds (game, design and noise change).\n"
        f"\n## {EVALUATIONS} evaluations\n"
    )
    compare(result, seeds)
    result.add(f"\n## Evaluations until the mean Spearman is {REACH}, noise sd {REACH_NOISE}\n")
    reach(result, seeds)
    result.add(f"\n## {EVALUATIONS} evaluations, 3000 players, a surrogate correlated 0.7, no noise\n")
    with_surrogate(result, seeds[:5])
    result.add("\n## Noise first (additive game, seed 0)\n")
    resolved(result)
    lines = [f"- {m}." for m in result.missed] or ["Nothing."]
    result.add("\n## Not reached\n\n" + "\n".join(lines))
    seconds = time.process_time() - started
    result.add(f"\nMeasured on {platform.machine()}, one thread, {seconds:.0f} CPU s.")
    arguments.output.write_text("\n".join(result.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
