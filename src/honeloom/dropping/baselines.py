"""Importances that look at no weight: what every metric has to beat."""

from __future__ import annotations

from honeloom.dropping.scores import Unit
from honeloom.ops.noise import uniform

__all__ = ["first", "last", "random"]


def random(unit: Unit, layers: int, *, seed: int) -> float:
    """A uniform number that follows from the seed and the unit alone."""
    return float(uniform(seed, f"drop/{unit.kind}/{unit.blocks}", layers)[unit.layer])


def last(unit: Unit, layers: int) -> float:
    """The number of layers behind a unit, so that the last goes first."""
    return float(layers - unit.layer - unit.blocks)


def first(unit: Unit, layers: int) -> float:
    """The number of layers before a unit, so that the first goes first."""
    return float(unit.layer)
