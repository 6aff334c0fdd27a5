"""Rows beside those to choose from: seeds, which say what the domains are, and rows for a probe to learn from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from honeloom.data.reader import read_rows
from honeloom.data.sources import resolve_sources
from honeloom.errors import RowsError
from honeloom.types.ports import RowTable
from honeloom.types.rows import Rejected, Row

__all__ = ["JoinedRows", "PickedRows", "read_probe_rows", "read_seeds", "seed_labels"]


class JoinedRows:
    """Other rows and then the rows of a table, as one RowTable: to be embedded in one space."""

    def __init__(self, others: Sequence[Row], rows: RowTable) -> None:
        self._others = list(others)
        self._rows = rows

    @property
    def ids(self) -> Sequence[str]:
        """Id of every row."""
        return [*(row.id for row in self._others), *self._rows.ids]

    @property
    def domains(self) -> Sequence[str | None]:
        """Domain of every row."""
        return [*(row.domain for row in self._others), *self._rows.domains]

    @property
    def sources(self) -> Sequence[str]:
        """Source of every row."""
        return [*(row.source for row in self._others), *self._rows.sources]

    def __len__(self) -> int:
        return len(self._others) + len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        yield from self._others
        yield from self._rows


class PickedRows:
    """Some rows of a table, in the table's order, as a RowTable."""

    def __init__(self, rows: RowTable, places: Collection[int]) -> None:
        self._rows = rows
        self._places = sorted(places)

    @property
    def ids(self) -> Sequence[str]:
        """Id of every row."""
        ids = self._rows.ids
        return [ids[i] for i in self._places]

    @property
    def domains(self) -> Sequence[str | None]:
        """Domain of every row."""
        domains = self._rows.domains
        return [domains[i] for i in self._places]

    @property
    def sources(self) -> Sequence[str]:
        """Source of every row."""
        sources = self._rows.sources
        return [sources[i] for i in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Row]:
        wanted = set(self._places)
        return (row for i, row in enumerate(self._rows) if i in wanted)


def read_seeds(path: str) -> list[Row]:
    """Read seed rows, in the order of their ids.

    Raises
    ------
    RowsError
        A row cannot be read or names no domain, or all name the same one.
    SourceError
        The file cannot be read.
    """
    found = _read(path, "seed")
    for row in found:
        if not row.domain:
            raise RowsError(f"{row.where}: a seed row names no domain; give every seed a `domain`")
    names = {row.domain for row in found}
    if len(names) < 2:
        raise RowsError(f"{path}: {len(found)} seed rows of {len(names)} domain; give rows of at least 2 domains")
    return sorted(found, key=lambda row: row.id)


def read_probe_rows(path: str) -> list[Row]:
    """Read rows for a probe to learn from, in the order of their ids; labels are not needed.

    Raises
    ------
    RowsError
        A row cannot be read.
    SourceError
        The file cannot be read.
    """
    return sorted(_read(path, "probe"), key=lambda row: row.id)


def _read(path: str, what: str) -> list[Row]:
    found = []
    for row in read_rows(resolve_sources([str(Path(path).expanduser())])):
        if isinstance(row, Rejected):
            raise RowsError(f"{row.where}: a {what} row cannot be used: {row.reason}; mend it or remove it")
        found.append(row)
    return found


def seed_labels(seeds: Sequence[Row]) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """The domains' names in order, and the place (m,) of every seed's domain among them."""
    names = sorted({row.domain or "" for row in seeds})
    return tuple(names), np.array([names.index(row.domain or "") for row in seeds], dtype=np.int64)
