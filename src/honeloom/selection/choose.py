"""From scores to a plan: the best rows within a budget of rows or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

from honeloom.ops.noise import keyed_uniform
from honeloom.types.plans import Scores, SelectPlan

__all__ = ["rows_to_keep", "take_best", "taking_order"]


def rows_to_keep(amount: Decimal | float, unit: str, usable: int) -> int:
    """How many rows to keep: a "share" is rounded half up and at least 1; "rows" are at most `usable`."""
    if unit == "rows":
        return min(int(amount), usable)
    exact = Decimal(str(amount)) * usable
    return max(1, int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP)))


def taking_order(scores: Scores, ids: Sequence[str], seed: int) -> list[int]:
    """Rows in the order in which they are taken: the method's own, else by score.

    Rows that could not be scored (-inf) come last, whichever end is the better one. Ties are
    broken by a draw from the seed and the row's id, so the choice does not depend on the order
    of the rows.

    Raises
    ------
    ValueError
        A score is NaN, or the method's order is not one of all rows: an error of the method.
    """
    if any(math.isnan(v) for v in scores.value):
        raise ValueError(f"{scores.method}: scores hold NaN; unknown rows must be -inf")
    if scores.order is not None:
        if sorted(scores.order) != list(range(len(ids))):
            raise ValueError(f"{scores.method}: its order does not list every row once")
        return list(scores.order)
    sign = 1.0 if scores.higher_is_better else -1.0
    draws = keyed_uniform(seed, "select/ties", ids)
    return sorted(
        range(len(ids)), key=lambda i: (scores.value[i] == -math.inf, -sign * scores.value[i], draws[i], ids[i])
    )


def take_best(
    scores: Scores, ids: Sequence[str], *, amount: Decimal | float, unit: str, seed: int,
    tokens: Sequence[int] | None = None,
) -> SelectPlan:  # fmt: skip
    """Keep the first rows of `taking_order`; with a token budget, those that fit.

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
    order = taking_order(scores, ids, seed)
    if unit != "tokens":
        return SelectPlan(tuple(sorted(order[: rows_to_keep(amount, unit, len(ids))])))
    if tokens is None:
        raise ValueError("a token budget needs the rows' token counts")
    left, keep = Decimal(str(amount)), []
    for i in order:
        if tokens[i] <= left:
            keep.append(i)
            left -= tokens[i]
    return SelectPlan(tuple(sorted(keep)))
