"""The rows that score a tuning: of the target, or held out of the rows to choose from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from honeloom.data.overlap import repeats
from honeloom.errors import RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.config import UtilityConfig
from honeloom.selection.sizes import MOST_HELD_OUT
from honeloom.types.ports import SelectionData
from honeloom.types.rows import Row

__all__ = ["Development", "development"]

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Development:
    """Rows that score a tuning.

    Attributes
    ----------
    rows : list of Row
        Of the target, or of the pool.
    held_out : array (N,) of bool
        Which rows of the pool they are.
    alike : array (N,) of bool
        Other rows of the pool that ask what one of them asks.
    """

    rows: list[Row]
    held_out: Bools
    alike: Bools


def development(data: SelectionData, utility: UtilityConfig, method: str) -> Development:
    """Draw them by the seed; `method` is named in messages.

    Raises
    ------
    RowsError
        No row is of the kind that the utility's score needs.
    """
    kinds = {"choice"} if utility.score == "accuracy" else {"chat", "text"}
    table = data.target if data.target is not None else data.rows
    draws = keyed_uniform(data.seed, "shed/target", table.ids)
    most = utility.target_rows
    if data.target is None:
        most = max(1, min(most, int(MOST_HELD_OUT * len(table))))
        data.warn(f"no target was given: {most} of the rows are held out to score tunings, and are taken last")
    fit = [i for i, row in enumerate(table) if row.kind in kinds]
    if not fit:
        raise RowsError(
            f"{method}: none of the {len(table)} rows of the target is of kind {' or '.join(sorted(kinds))}, which "
            f"score {utility.score!r} needs; give other rows (--target) or another method.utility.score"
        )
    chosen = set(sorted(fit, key=lambda i: (draws[i], table.ids[i]))[:most])
    rows = [row for i, row in enumerate(table) if i in chosen]
    held_out, alike = np.zeros(len(data.rows), dtype=bool), np.zeros(len(data.rows), dtype=bool)
    if data.target is None:
        held_out[list(chosen)] = True
        alike[[i for i, _, _ in repeats(rows, data.rows) if i not in chosen]] = True
        if alike.any():
            data.warn(f"{int(alike.sum())} other rows ask what a held-out row asks; no tuning is scored on what it saw")
    return Development(rows, held_out, alike)
