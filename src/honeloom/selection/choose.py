"""From scores to a plan: the best rows within a budget of rows or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

from honeloom.ops.noise import keyed_uniform
from honeloom.types.plans import Scores, SelectPlan

__all__ = ["rows_to_keep", "take_best"]


def rows_to_keep(amount: Decimal | float, unit: Literal["share", "rows"], usable: int) -> int:
    """How many rows to keep: a share is rounded half up and at least 1; a count is at most `usable`."""
    if unit == "rows":
        return min(int(amount), usable)
    exact = Decimal(str(amount)) * usable
    return max(1, int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP)))


def take_best(
    scores: Scores, ids: Sequence[str], *, amount: Decimal | float, unit: str, seed: int,
    tokens: Sequence[int] | None = None,
) -> SelectPlan:  # fmt: skip
    """Keep the best rows; those that could not be scored (-inf) come last, whichever end is the better one.

    Ties are broken by a draw from the seed and the row's id, so the choice does not depend on
    the order of the rows. With a token budget rows are taken in order of score while they fit.

    Parameters
    ----------
    scores : Scores
        One value per row; NaN is an error of the method.
    ids : sequence of str
        Of the rows.
    amount, unit
        As of `SelectConfig.keep_amount`.
    tokens : sequence of int, optional
        Tokens of every row, for a token budget.
    """
    sign = 1.0 if scores.higher_is_better else -1.0
    draws = keyed_uniform(seed, "select/ties", ids)
    if any(math.isnan(v) for v in scores.value):
        raise ValueError(f"{scores.method}: scores hold NaN; unknown rows must be -inf")
    order = sorted(
        range(len(ids)), key=lambda i: (scores.value[i] == -math.inf, -sign * scores.value[i], draws[i], ids[i])
    )
    if unit != "tokens":
        return SelectPlan(
            tuple(sorted(order[: rows_to_keep(amount, "share" if unit == "share" else "rows", len(ids))]))
        )
    if tokens is None:
        raise ValueError("a token budget needs the rows' token counts")
    left, keep = Decimal(str(amount)), []
    for i in order:
        if tokens[i] <= left:
            keep.append(i)
            left -= tokens[i]
    return SelectPlan(tuple(sorted(keep)))
