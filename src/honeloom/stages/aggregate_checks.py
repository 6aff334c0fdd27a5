"""What is claimed of a written aggregate, measured against the adapters it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from honeloom.checkpoint.adapter import LoraFile
from honeloom.federated.aggregation.exactness import error_norms, target_factors
from honeloom.federated.aggregation.warm import whole
from honeloom.ops.lowrank import relative_error, thin_svd
from honeloom.ops.noise import permutation
from honeloom.stages.aggregate_clients import Client, read_parts
from honeloom.types.report import Check
from honeloom.types.updates import Combined, Part

__all__ = ["Exactness", "check_written", "measure_written"]

Rule = Callable[[Sequence[Part]], Combined]

_EXACT = frozenset({"flora", "ffa", "rolora", "fedex"})
_BEST = frozenset({"svd", "flexlora"})
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Rounding both factors to a type moves their product by about its unit roundoff; room for a few of them."""
_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Exactness:
    """How far the written factors are from the weighted sum of updates.

    Attributes
    ----------
    modules : dict
        Module -> relative error.
    relative : float
        Over all modules together.
    rounding : float
        Largest error of a module relative to the norms that went in.
    """

    modules: dict[str, float]
    relative: float
    rounding: float


def measure_written(clients: Sequence[Client], written: LoraFile, seed: int) -> Exactness:
    """Compare factors as they were written with the clients' updates, module by module."""
    found, differences, targets, rounding = {}, 0.0, 0.0, 0.0
    for module in written.factors:
        norms = error_norms(_read_back(written, module), read_parts(clients, module), seed=seed)
        found[module] = norms.relative
        differences += norms.difference**2
        targets += norms.target**2
        rounding = max(rounding, norms.scaled)
    total = (differences / targets) ** 0.5 if targets else float(differences > 0)
    return Exactness(found, total, rounding)


def check_written(
    clients: Sequence[Client], written: LoraFile, rule: Rule, method: str, measured: Exactness, seed: int
) -> tuple[Check, ...]:
    """Claims of a written adapter: how it will be loaded, and what its factors are.

    Parameters
    ----------
    clients : sequence of Client
        What was aggregated.
    written : LoraFile
        The result, read back from the disk.
    rule : callable
        The rule with its settings.
    method : str
        Its name; exact rules must give the sum, best approximations must be the best ones, and
        any other result must be what the rule gives in float64.
    measured : Exactness
        From `measure_written`.
    seed : int
        Chooses the modules that are looked at closely.
    """
    dtype = written.weights.read(next(iter(written.factors.values())).a_name).dtype
    limit = _TOLERANCE[dtype]
    odd = sum(factors.scale != 1.0 for factors in written.factors.values())
    loads = Check("modules whose scale in the loader would not be 1", odd, 0, odd == 0)
    if method in _EXACT:
        claim = "the written factors give the weighted sum of updates (largest relative error of a module)"
        value = measured.rounding
    elif method in _BEST:
        claim = "error beyond that of the best factors of their rank (relative, in three modules)"
        value = max(_excess(clients, written, module) for module in _sample(written, seed))
    else:
        claim = "the written factors are what the rule gives in float64 (largest relative difference)"
        value = max(_distance(clients, written, module, rule) for module in written.factors)
    return loads, Check(claim, value, limit, value <= limit)


def _read_back(written: LoraFile, module: str) -> Combined:
    factors = written.factors[module]
    b, a = (written.weights.read(name, torch.float64) for name in (factors.b_name, factors.a_name))
    return Combined(b * factors.scale, a)


def _sample(written: LoraFile, seed: int) -> list[str]:
    modules = list(written.factors)
    return [modules[i] for i in permutation(seed, "aggregate/check", len(modules)).tolist()[:_SAMPLES]]


def _excess(clients: Sequence[Client], written: LoraFile, module: str) -> float:
    """Error of the written factors minus the share that the singular values beyond their rank hold."""
    got, target = _read_back(written, module), target_factors(read_parts(clients, module))
    squares = thin_svd(*target)[1].square()
    total = float(squares.sum())
    tail = (float(squares[got.rank :].sum()) / total) ** 0.5 if total else 0.0
    return max(0.0, relative_error(got.b, got.a, *target) - tail)


def _distance(clients: Sequence[Client], written: LoraFile, module: str, rule: Rule) -> float:
    got = _read_back(written, module)
    return relative_error(got.b, got.a, *whole(rule(read_parts(clients, module, torch.float64))))
