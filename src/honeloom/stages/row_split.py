"""Parts of a set of rows by their ids; light, for plans too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from honeloom.data.rowset import RowSet
from honeloom.data.sources import RowFile
from honeloom.errors import RowsError

__all__ = ["place_of", "read_split"]


def read_split(files: Sequence[RowFile], *, split: tuple[float, float] | None, **reading: Any) -> RowSet:
    """Read the rows whose id lies in [start, stop) of `split`, or all; `reading` is of `RowSet.scan`."""
    rows = RowSet.scan(files, **reading)
    if split is None:
        return rows
    chosen = [i for i, row_id in enumerate(rows.ids) if split[0] <= place_of(row_id) < split[1]]
    if not chosen:
        raise RowsError(f"split {split[0]}-{split[1]}: none of the {len(rows)} rows lies in it; widen it")
    return rows.take(chosen)


def place_of(row_id: str) -> float:
    """Place of an id in [0, 1): its SHA-256 in hex, read from the last digit."""
    return int(hashlib.sha256(row_id.encode()).hexdigest()[:-14:-1], 16) / 16**13
