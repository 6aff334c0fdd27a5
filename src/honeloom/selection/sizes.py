"""How many: rows that are kept, players, tunings. Light, so that a plan can count before anything runs."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

from honeloom.errors import RowsError

__all__ = [
    "BAND_REPEATS", "BAND_ROWS", "BAND_WIDTH", "FEWEST_STEPS", "LABEL_PROXIES", "MOST_HELD_OUT", "SHED_BUDGET",
    "SURROGATE_EPOCHS", "half_up", "player_count", "rows_to_keep",
]  # fmt: skip

SHED_BUDGET = 300
"""Evaluations of shed where no budget is set."""
MOST_PLAYERS = 3000
ROWS_PER_PLAYER = 8
LABEL_PROXIES = 32
"""Rows that stand for a source or a domain, which no centroid describes."""
FEWEST_STEPS = 8
"""Of a utility's tuning, where they are not set."""
SURROGATE_EPOCHS = 2
"""Passes over the proxies of the tuning that gives the surrogate."""
MOST_HELD_OUT = 0.1
"""Share of the rows that is held out at most where no target is given."""
BAND_WIDTH = 20
"""Percentiles of a band that is searched for, as in the paper."""
BAND_ROWS = 2000
"""Rows of a band that a search tunes on at most: bands are compared, not exhausted."""
BAND_REPEATS = 3
"""Tunings on every band, where no budget is set."""


def player_count(rows: int, asked: int | None, budget: int) -> int:
    """How many clusters play: as asked, else a third of the budget, at most 3000 and at most one per 8 rows.

    Raises
    ------
    RowsError
        Fewer than two rows.
    """
    if rows < 2:
        raise RowsError(f"shed: {rows} rows to choose from, and values need at least 2 players; give more rows")
    if asked is not None:
        return min(asked, rows)
    return max(2, min(MOST_PLAYERS, budget // 3, rows // ROWS_PER_PLAYER))


def rows_to_keep(amount: Decimal | float, unit: str, usable: int) -> int:
    """How many rows to keep: a "share" is rounded half up and at least 1; "rows" are at most `usable`."""
    if unit == "rows":
        return min(int(amount), usable)
    return max(1, half_up(Decimal(str(amount)) * usable))


def half_up(exact: Decimal) -> int:
    """The nearest whole number, halves upwards."""
    return int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP))
