"""Random choice with equal shares of every stratum."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

from honeloom.ops.noise import keyed_uniform
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["stratified"]


def stratified(data: SelectionData, *, by: Literal["domain", "source"] = "domain") -> Scores:
    """Score a row by its random rank within its stratum, as a share of the stratum.

    Taking the top p % then takes p % of every stratum, up to rounding. Rows without a label
    form a stratum of their own.
    """
    labels = data.rows.domains if by == "domain" else data.rows.sources
    draws = keyed_uniform(data.seed, "select/stratified", data.rows.ids)
    strata: dict[str | None, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        strata[label].append(i)
    values = [0.0] * len(labels)
    for members in strata.values():
        for rank, i in enumerate(sorted(members, key=lambda j: (-draws[j], data.rows.ids[j]))):
            values[i] = 1 - (rank + 0.5) / len(members)
    columns = {"stratum": [label or "" for label in labels]}
    return Scores(tuple(values), higher_is_better=True, method="stratified", columns=columns)
