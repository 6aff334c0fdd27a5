"""From scores to a plan: the best rows within a budget of rows or tokens, and the quotas of groups."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from honeloom.errors import RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.sizes import half_up, rows_to_keep
from honeloom.types.plans import Scores, SelectPlan

__all__ = ["Quotas", "rows_to_keep", "take_best", "taking_order"]


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


@dataclass(frozen=True, slots=True)
class Quotas:
    """Shares of what is kept that go to groups of rows.

    Attributes
    ----------
    group : sequence of str or None
        Of every row.
    share : mapping of str to Decimal
        Of some groups, in [0, 1], together at most 1; the other rows share what is left.
    """

    group: Sequence[str | None]
    share: Mapping[str, Decimal]


def take_best(
    scores: Scores, ids: Sequence[str], *, amount: Decimal | float, unit: str, seed: int,
    tokens: Sequence[int] | None = None, first: Collection[int] = (), quotas: Quotas | None = None,
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
    first : collection of int
        Rows that are kept whatever their score; they count.
    quotas : Quotas, optional
        No group is given more than its share, save by `first`. What a group is too small for goes
        to the rows without a quota.

    Raises
    ------
    RowsError
        The rows of `first` alone are more than what is kept.
    """
    order = taking_order(scores, ids, seed)
    if unit == "tokens":
        if tokens is None:
            raise ValueError("a token budget needs the rows' token counts")
        cost, budget = tokens, int(amount)
    else:
        cost, budget = [1] * len(ids), rows_to_keep(amount, unit, len(ids))
    room = _Room(cost, budget, quotas, "tokens" if unit == "tokens" else "rows")
    order = [*(i for i in order if i in first), *(i for i in order if i not in first)]
    for place, i in enumerate(order):
        room.take(i, always=place < len(first))
    if room.short():
        room.release()
        for i in order:
            room.take(i)
    return SelectPlan(tuple(sorted(room.kept)))


class _Room:
    """What is left of a budget, by group."""

    def __init__(self, cost: Sequence[int], budget: int, quotas: Quotas | None, unit: str) -> None:
        self.kept: set[int] = set()
        self._cost, self._left, self._budget, self._unit = cost, budget, budget, unit
        self._group: Sequence[str | None] = quotas.group if quotas else [None] * len(cost)
        shares = quotas.share if quotas else {}
        self._quota = _allotted(shares, budget)

    def take(self, i: int, *, always: bool = False) -> None:
        """Keep a row if it fits, or `always`."""
        name, cost = self._group[i], self._cost[i]
        if i in self.kept:
            return
        mine = self._quota[name] if name in self._quota else self._left - self._reserved()
        if always and cost > self._left:
            raise RowsError(
                f"the rows that must be kept are more than the {self._budget} {self._unit} to keep; raise --keep, or "
                "name fewer"
            )
        if always or cost <= min(mine, self._left):
            self.kept.add(i)
            self._left -= cost
            if name in self._quota:
                self._quota[name] -= cost

    def _reserved(self) -> int:
        return sum(left for left in self._quota.values() if left > 0)

    def short(self) -> bool:
        """Whether a group has not used up its quota."""
        return self._reserved() > 0

    def release(self) -> None:
        """Give what groups have not used to the rows without a quota."""
        self._quota = dict.fromkeys(self._quota, 0)


def _allotted(shares: Mapping[str, Decimal], budget: int) -> dict[str, int]:
    """Whole numbers that together are the rounded sum of the shares; the largest remainders are rounded up."""
    exact = {name: share * budget for name, share in shares.items()}
    found = {name: int(amount) for name, amount in exact.items()}
    left = min(budget, half_up(sum(exact.values(), Decimal(0)))) - sum(found.values())
    for name in sorted(exact, key=lambda n: (found[n] - exact[n], n))[:left]:
        found[name] += 1
    return found
