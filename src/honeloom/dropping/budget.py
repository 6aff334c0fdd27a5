"""Budgets: what a dropped model may cost at most, as a number or as a share of what the source costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from honeloom.registry import suggest

__all__ = ["BUDGETS", "COSTS", "Budget", "BudgetKey", "parse_budget", "read_budgets"]

BudgetKey = Literal["kv_bytes_per_token", "params", "flops", "loss_increase"]
BUDGETS: tuple[BudgetKey, ...] = get_args(BudgetKey)
COSTS: Mapping[BudgetKey, str] = {
    "kv_bytes_per_token": "kv_bytes_per_token",
    "params": "params",
    "flops": "flops_per_token",
}
"""Budgets on what the plan alone decides -> the cost that they limit."""
_FORM = re.compile(r"^\s*([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(%?)\s*$")


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit.

    Attributes
    ----------
    key : str
        One of `BUDGETS`; "loss_increase" is in nats per scored token, or a share of the source's loss.
    amount : float
        The number, or percent.
    percent : bool
        Whether it is a share of what the source has.
    """

    key: BudgetKey
    amount: float
    percent: bool

    def limit(self, before: float) -> float:
        """The most that the result may have, given what the source has."""
        return before * self.amount / 100 if self.percent else self.amount

    def __str__(self) -> str:
        return f"{self.key}={self.amount:g}{'%' if self.percent else ''}"


def parse_budget(key: str, value: Any) -> Budget:
    """Read one budget.

    Parameters
    ----------
    key : str
        One of `BUDGETS`.
    value : str or number
        75% or an absolute number.

    Raises
    ------
    ValueError
        The key is unknown, the value is no such number, or it would allow more than the source has.
    """
    if key not in BUDGETS:
        raise ValueError(f"budget {key!r}{suggest(key, BUDGETS)}: choose from {', '.join(BUDGETS)}")
    found = _FORM.match(str(value))
    if isinstance(value, bool) or found is None:
        raise ValueError(f"budget {key}: {value!r} is no limit; give a number such as 1.5e9, or a share such as 75%")
    amount, percent = float(found[1]), bool(found[2])
    if not math.isfinite(amount) or (amount <= 0 and key != "loss_increase"):
        raise ValueError(f"budget {key}: {value!r} leaves nothing; give a number above 0, or a share such as 75%")
    if percent and amount >= 100 and key != "loss_increase":
        raise ValueError(f"budget {key}: {value!r} is no less than the model has; give a share below 100%")
    return Budget(key, amount, percent)


def read_budgets(value: Any) -> dict[str, str]:
    """Budgets by key, from a mapping, from "KEY=VALUE" texts, or from one such text.

    Raises
    ------
    ValueError
        A text has no "=", a key comes twice, or a value is no limit.
    """
    pairs = list(value.items()) if isinstance(value, Mapping) else [_pair(text) for text in _texts(value)]
    found: dict[str, str] = {}
    for key, amount in pairs:
        if key in found:
            raise ValueError(f"budget {key} is given twice; give it once")
        parse_budget(key, amount)
        found[key] = str(amount).strip()
    return found


def _texts(value: Any) -> Iterable[Any]:
    return (value,) if isinstance(value, str) else value


def _pair(text: Any) -> tuple[str, str]:
    key, equals, amount = str(text).partition("=")
    if not equals:
        raise ValueError(f"budget {text!r}: give KEY=VALUE, as params=75%; KEY is one of {', '.join(BUDGETS)}")
    return key.strip(), amount
