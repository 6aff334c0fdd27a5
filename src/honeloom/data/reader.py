"""Rows from files, one at a time: what can be used as `Row`, what cannot as `Rejected`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from honeloom.data.duplicates import DuplicateFinder
from honeloom.data.formats import normalise, own_id
from honeloom.data.records import Lines, Record, Unusable, raw_records
from honeloom.data.sources import RowFile
from honeloom.errors import ConfigError
from honeloom.types.rows import Rejected, Row, Where

__all__ = ["read_file", "read_numbered", "read_rows"]


def read_rows(files: Sequence[RowFile], *, limit: int | None = None) -> Iterator[Row | Rejected]:
    """Stream the rows of files in order.

    A row with the id of an earlier row and other content is rejected; equal rows are not.

    Parameters
    ----------
    files : sequence of RowFile
        From `resolve_sources`.
    limit : int, optional
        Read only the first so many rows, usable or not.

    Raises
    ------
    SourceError
        If a file cannot be read on.
    """
    finder = DuplicateFinder(exact=False)
    for _, row in read_numbered(files, limit=limit):
        yield row if isinstance(row, Rejected) else finder.check(row) or row


def read_numbered(files: Sequence[RowFile], *, limit: int | None = None) -> Iterator[tuple[int, Row | Rejected]]:
    """Stream (position of the file, row), without comparing rows with each other."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1 (leave it out to read every row)")
    return islice(((i, row) for i, file in enumerate(files) for row in read_file(file)), limit)


def read_file(file: RowFile, wanted: Lines | None = None) -> Iterator[Row | Rejected]:
    """Stream the rows of one file, or those at the wanted (ascending) lines; withdrawn ones are passed over."""
    rows = (_row(file, record) for record in raw_records(file, wanted))
    gone = frozenset(file.without)
    return (row for row in rows if row.id not in gone) if gone else rows


def _row(file: RowFile, record: Record) -> Row | Rejected:
    where = Where(file.label, record.line)
    values = None
    try:
        values = record.load()
        return normalise(values, where, file.stem)
    except Unusable as unusable:
        return Rejected(where, unusable.reason, own_id(values) if values else None, unusable.kind)
