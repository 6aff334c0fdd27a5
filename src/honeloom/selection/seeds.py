"""Seed rows: a few of every domain, which say what the domains are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from honeloom.data.reader import read_rows
from honeloom.data.sources import resolve_sources
from honeloom.errors import RowsError
from honeloom.types.ports import RowTable
from honeloom.types.rows import Rejected, Row

__all__ = ["JoinedRows", "read_seeds", "seed_labels"]


class JoinedRows:
    """Seed rows and then the rows of a table, as one RowTable: to be embedded in one space."""

    def __init__(self, seeds: Sequence[Row], rows: RowTable) -> None:
        self._seeds = list(seeds)
        self._rows = rows

    @property
    def ids(self) -> Sequence[str]:
        """Id of every row."""
        return [*(row.id for row in self._seeds), *self._rows.ids]

    @property
    def domains(self) -> Sequence[str | None]:
        """Domain of every row."""
        return [*(row.domain for row in self._seeds), *self._rows.domains]

    @property
    def sources(self) -> Sequence[str]:
        """Source of every row."""
        return [*(row.source for row in self._seeds), *self._rows.sources]

    def __len__(self) -> int:
        return len(self._seeds) + len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        yield from self._seeds
        yield from self._rows


def read_seeds(path: str) -> list[Row]:
    """Read seed rows, in the order of their ids.

    Raises
    ------
    RowsError
        A row cannot be read or names no domain, or all name the same one.
    SourceError
        The file cannot be read.
    """
    found = []
    for row in read_rows(resolve_sources([str(Path(path).expanduser())])):
        if isinstance(row, Rejected):
            raise RowsError(f"{row.where}: a seed row cannot be used: {row.reason}; mend it or remove it")
        if not row.domain:
            raise RowsError(f"{row.where}: a seed row names no domain; give every seed a `domain`")
        found.append(row)
    names = {row.domain for row in found}
    if len(names) < 2:
        raise RowsError(f"{path}: {len(found)} seed rows of {len(names)} domain; give rows of at least 2 domains")
    return sorted(found, key=lambda row: row.id)


def seed_labels(seeds: Sequence[Row]) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """The domains' names in order, and the place (m,) of every seed's domain among them."""
    names = sorted({row.domain or "" for row in seeds})
    return tuple(names), np.array([names.index(row.domain or "") for row in seeds], dtype=np.int64)
