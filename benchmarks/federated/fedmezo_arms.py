"""What the benchmark of zeroth-order clients compares: arms, how long each runs, and at which rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo_runs import CLIENTS, Options, World, best_rate, run, world

SEEDS = (0, 1, 2, 3, 4)
TIMES = (10, 30, 100)
"""Forward passes as multiples of first-order tuning's."""
SIGNS = {"type": "mezo", "direction": "rademacher", "setting": "speed"}
NORMAL = {"type": "mezo", "direction": "gaussian", "setting": "speed"}
ADAMW, SGD = {"type": "adamw"}, {"type": "sgd"}


@dataclass(frozen=True)
class Budget:
    """First-order rounds and steps of a client in each, and a client's zeroth-order steps in a round."""

    rounds: int
    steps: int
    local: int

    def marks(self, times: Sequence[int]) -> tuple[int, ...]:
        """Rounds after which two-point steps have taken so many times the forward passes."""
        return tuple(max(1, round(t * self.rounds * self.steps / 2 / self.local)) for t in times)


BUDGETS = {"stories260k": Budget(3, 10, 30), "base6m": Budget(2, 2, 20)}
LOCAL: dict[str, Any] = {
    "stories260k": {"batch_size": 2, "max_length": 128, "ranks": 8},
    "base6m": {
        "batch_size": 8,
        "max_length": 64,
        "ranks": 8,
        "partition": {"type": "dirichlet", "n": CLIENTS, "alpha": 0.3},
    },
}
ARMS: dict[str, tuple[Options, tuple[float, ...]]] = {
    "B alone, signs": ({"aggregation": "ffa", "uplink": "scalars", "optimizer": SIGNS}, (6e-4, 1.2e-3)),
    "B alone, signs, 4 directions": (
        {"aggregation": "ffa", "uplink": "scalars", "optimizer": {**SIGNS, "directions": 4}}, (1.2e-3, 2.4e-3),
    ),
    "A and B, normal (as published)": ({"aggregation": "fedit", "optimizer": NORMAL}, (3e-4, 6e-4)),
    "A and B rebuilt by the server, svd": (
        {"aggregation": "svd", "uplink": "scalars", "optimizer": SIGNS}, (3e-4, 6e-4),
    ),
    "all weights, pool of 1024": ({"uplink": "seed-pool", "method": "full", "optimizer": SIGNS}, (4e-5, 8e-5)),
}  # fmt: skip
SHOWN = {"stories260k": tuple(ARMS), "base6m": ("B alone, signs",)}
"""Arms by model; a run on base6m takes six minutes."""
FALLING: dict[str, Options] = {"base6m": {"schedule": "cosine"}}
"""What else a model's zeroth-order arms take: on base6m noise outruns a rate that stays."""
GIVEN = {"base6m": 1.2e-3}
"""A rate that was not searched for at full length, which takes six minutes a run: half of the best of a grid of factors
of two (3e-4 to 4.8e-3, constant) at 30 times the passes."""
FIRST: Options = {"aggregation": "fedit", "optimizer": ADAMW}
CLIPPED = 1e9
"""No gradient is scaled down: plain SGD is the published comparison."""


def worlds(data: Path, out: Path) -> dict[str, World]:
    """Both models."""
    return {name: world(name, data, out / name, **LOCAL[name]) for name in LOCAL}


def options_of(name: str, arm: str) -> Options:
    """Settings of an arm on a model, with as many steps as its directions leave."""
    given, budget = dict(ARMS[arm][0]), BUDGETS[name]
    steps = budget.local // int(given["optimizer"].get("directions", 1))
    if given.get("method") == "full":
        given["ranks"] = 8  # the default: there are no adapters
    return {**given, **FALLING.get(name, {}), "local_steps": max(1, steps)}


def first_order(at: World) -> dict[str, Any]:
    """AdamW at its best rate, on every seed."""
    budget = BUDGETS[at.name]
    options = {**FIRST, "local_steps": budget.steps}
    rates = best_rate(at, options, (2e-3, 4e-3), budget.rounds)
    runs = [run(at, options, rates[0][0], seed, (0, budget.rounds), at.test) for seed in SEEDS]
    return {"rates": rates, "runs": runs, "mark": budget.rounds}


def zeroth_order(at: World, arm: str, times: Sequence[int]) -> dict[str, Any]:
    """An arm at its best rate, on every seed, with losses at every multiple of forward passes."""
    options, marks = options_of(at.name, arm), BUDGETS[at.name].marks(times)
    choice = marks[min(1, len(marks) - 1)]
    rates = [(GIVEN[at.name], float("nan"))] if at.name in GIVEN else best_rate(at, options, ARMS[arm][1], choice)
    runs = [run(at, options, rates[0][0], seed, (0, *marks), at.test) for seed in SEEDS]
    return {"rates": rates, "runs": runs, "marks": marks, "choice": choice, "options": options}


def sgd(at: World, lr: float | None, times: Sequence[int]) -> dict[str, Any]:
    """The paper's comparison: FedAvg of adapters with plain SGD, as many steps, at a zeroth-order rate or its best."""
    budget = BUDGETS[at.name]
    options = {**FIRST, "optimizer": SGD, "local_steps": budget.local, "max_grad_norm": CLIPPED}
    marks = budget.marks(times)
    rates = best_rate(at, options, (1e-2, 4e-2), marks[-1]) if lr is None else [(lr, float("nan"))]
    runs = [run(at, options, rates[0][0], seed, (0, *marks), at.test) for seed in SEEDS]
    return {"rates": rates, "runs": runs, "marks": marks}


# rates of single clients, and what else decides how fast it goes

STEADY: Options = {"aggregation": "ffa", "uplink": "scalars", "optimizer": SIGNS, "local_steps": 10}
ROUNDS, SHORT = 12, 10
RATES: dict[str, Options] = {
    "one rate for all": {},
    "difference (the paper's best)": {"rates": {"statistic": "difference"}},
    "difference, robust": {"rates": {"statistic": "difference", "robust": True}},
    "difference, robust, spread 0.9": {"rates": {"statistic": "difference", "robust": True, "spread": 0.9}},
    "losses of five rounds": {"rates": {"statistic": "five_rounds"}},
    "random (control)": {"rates": {"statistic": "random"}},
}
IID = {"partition": {"type": "iid", "n": CLIENTS}}
SWEEPS: dict[str, dict[str, Options]] = {
    "clients N (rows split alike)": {str(n): {"partition": {"type": "iid", "n": n}} for n in (2, 4, 8, 16)},
    "local steps H": {str(h): {"local_steps": h} for h in (5, 10, 30)},
    "mu": {f"{mu:g}": {"optimizer": {**SIGNS, "mu": mu}} for mu in (2e-4, 1e-3, 5e-3)},
    "LoRA rank": {str(r): {"ranks": r} for r in (2, 8, 32)},
    "rows of the clients": {
        "alike": IID, "Dirichlet 0.5": {"partition": {"type": "dirichlet", "n": CLIENTS}},
        "one domain or some each": {},
    },
}  # fmt: skip


def personal(at: World, lr: float) -> dict[str, list[dict[str, Any]]]:
    """Runs by kind of rate, on every seed, at one base rate."""
    return {
        name: [run(at, {**STEADY, **more}, lr, seed, (0, ROUNDS), at.test) for seed in SEEDS]
        for name, more in RATES.items()
    }


def swept(at: World, lr: float) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs by what is varied, on one seed, at one rate."""
    return {
        title: {
            value: [run(at, {**STEADY, **more}, lr, seed, (0, SHORT), at.test) for seed in SEEDS[:1]]
            for value, more in values.items()
        }
        for title, values in SWEEPS.items()
    }


MESSAGES: dict[str, Options] = {
    "fedit, AdamW": {**FIRST, "local_steps": 1},
    "zero_pad, AdamW": {**FIRST, "aggregation": "zero_pad", "local_steps": 1},
    "ffa, AdamW": {**FIRST, "aggregation": "ffa", "local_steps": 1},
    "svd, AdamW": {**FIRST, "aggregation": "svd", "local_steps": 1},
    "flora, AdamW": {**FIRST, "aggregation": "flora", "local_steps": 1},
    "fedit, mezo, tensors (as published)": {"aggregation": "fedit", "optimizer": SIGNS, "local_steps": 30},
    "ffa, mezo, scalars": {**STEADY, "local_steps": 30},
    "svd, mezo, scalars": {**STEADY, "aggregation": "svd", "local_steps": 30},
    "ffa, mezo, pool of 1024": {"uplink": "seed-pool", "optimizer": SIGNS, "local_steps": 30},
    "ffa, mezo, pool of 1024, secure": {
        "uplink": "seed-pool", "optimizer": SIGNS, "local_steps": 30, "privacy": {"secagg": True},
    },
    "all weights, mezo, pool of 1024": {
        "uplink": "seed-pool", "method": "full", "optimizer": SIGNS, "local_steps": 30,
    },
}  # fmt: skip


def messages(at: World) -> dict[str, dict[str, Any]]:
    """Bytes of a client in the second round, in which all that goes on from the first is there."""
    found = {}
    for name, options in MESSAGES.items():
        short = {"batch_size": 1, "max_length": 64}  # rows change nothing about what travels
        done = run(at, {**options, **short}, 1e-6, 0, (2,), at.choice)
        found[name] = done["rounds"][-1]
    return found
