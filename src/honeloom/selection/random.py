"""Uniform random choice."""

from __future__ import annotations

from honeloom.ops.noise import keyed_uniform
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["random"]


def random(data: SelectionData) -> Scores:
    """Score every row by a uniform number that depends on the seed and its id alone.

    The choice therefore does not depend on the order of the rows, and a larger share
    contains the smaller ones.
    """
    values = keyed_uniform(data.seed, "select/random", data.rows.ids)
    return Scores(tuple(values.tolist()), higher_is_better=True, method="random")
