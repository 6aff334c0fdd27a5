"""Rows to files: a selection as it stood in the input, the rejected rows, and other formats.

Every function writes into a folder the caller prepared, and leaves the bytes on the disk (fsync).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from honeloom.data import optional
from honeloom.data.convert import COLUMNS, CONVERTERS, RowFormat
from honeloom.data.records import Unusable, raw_records, to_json
from honeloom.data.rowset import RowSet
from honeloom.data.sources import RowFile
from honeloom.errors import ConfigError
from honeloom.types.rows import Rejected, Row

__all__ = ["convert_rows", "row_ending", "write_rejected", "write_selected"]


def write_selected(rowset: RowSet, indices: Iterable[int], directory: Path, stem: str = "selected") -> Path:
    """Write the chosen rows in their original schema and in the input's order.

    JSON lines are copied byte for byte, whatever their spacing, key order and line ends; only a
    missing last newline is added. The container is that of the first input file: `.jsonl.gz` for
    compressed JSON lines, `.parquet` for Parquet or Arrow where all inputs are tables of one
    schema, and `.jsonl` for everything else and for rows from a hub.

    Parameters
    ----------
    rowset : RowSet
        The rows to choose from.
    indices : iterable of int
        Positions in the set, in any order, each once.
    directory : Path
        An existing folder.
    stem : str
        The file's name without its ending.

    Returns
    -------
    Path
        The file written. The same choice always gives the same bytes.
    """
    chosen = rowset.take(indices)
    ending = _container(rowset.files)
    path = directory / f"{stem}{ending}"
    with _synced(path) as target:
        if ending == ".parquet":
            optional.load("tables").copy_rows(chosen.places(), rowset.files[0], target)
        elif ending == ".jsonl.gz":
            with _packed(target) as packed:
                _copy_lines(chosen, packed)
        else:
            _copy_lines(chosen, target)
    return path


def write_rejected(rejected: Iterable[Rejected], path: Path) -> Path:
    """Write rejected rows as Parquet with the columns id, file, line and reason; returns the path."""
    values = ({"id": r.id, "file": r.where.file, "line": r.where.line, "reason": r.reason} for r in rejected)
    columns = {"id": "string", "file": "string", "line": "int64", "reason": "string"}
    with _synced(path) as target:
        optional.load("tables").write_values(values, columns, target)
    return path


def convert_rows(rows: Iterable[Row], to: RowFormat, path: Path) -> tuple[int, list[Rejected]]:
    """Write rows in another format.

    Parameters
    ----------
    rows : iterable of Row
        Conversations; rows that the format cannot hold are left out.
    to : {"messages", "alpaca", "sharegpt", "prompt-completion"}
        The format. Earlier exchanges of a conversation become alpaca's `history`.
    path : Path
        Ends in `.jsonl`, `.jsonl.gz` or `.parquet`.

    Returns
    -------
    tuple of int and list of Rejected
        How many rows were written, and which were not and why.
    """
    if to not in CONVERTERS:
        raise ConfigError(f"unknown row format {to!r}; allowed: {', '.join(CONVERTERS)}")
    ending = row_ending(path)
    left_out: list[Rejected] = []
    written = _Counted(_converted(rows, CONVERTERS[to], left_out))
    with _synced(path) as target:
        if ending == ".parquet":
            optional.load("tables").write_values(written, COLUMNS[to], target)
        elif ending == ".jsonl.gz":
            with _packed(target) as packed:
                packed.writelines(to_json(value).encode() + b"\n" for value in written)
        else:
            target.writelines(to_json(value).encode() + b"\n" for value in written)
    return written.count, left_out


def row_ending(path: Path) -> str:
    """Return which of the endings that rows can be written with a path has; ConfigError if it has none."""
    for ending in (".jsonl.gz", ".jsonl", ".parquet"):
        if path.name.endswith(ending):
            return ending
    raise ConfigError(f"cannot write rows to {path.name}; the name must end in .jsonl, .jsonl.gz or .parquet")


class _Counted:
    """An iterable that counts what passes through it."""

    def __init__(self, values: Iterable[dict[str, Any]]) -> None:
        self._values = values
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for value in self._values:
            self.count += 1
            yield value


def _converted(
    rows: Iterable[Row], convert: Callable[[Row], dict[str, Any]], left_out: list[Rejected]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            yield convert(row)
        except Unusable as unusable:
            left_out.append(Rejected(row.where, unusable.reason, row.id, unusable.kind))


def _container(files: tuple[RowFile, ...]) -> str:
    first = files[0]
    if first.from_hub:
        return ".jsonl"
    if first.format in ("parquet", "arrow") and optional.load("tables").same_schema(files):
        return ".parquet"
    return ".jsonl.gz" if first.format == "jsonl" and first.compression == "gz" else ".jsonl"


def _copy_lines(rows: RowSet, target: BinaryIO) -> None:
    for file, wanted in rows.places():
        target.writelines(record.as_line() for record in raw_records(file, wanted))


def _packed(target: BinaryIO) -> BinaryIO:
    # Neither name nor time goes into the header: equal rows give equal bytes.
    return cast(BinaryIO, gzip.GzipFile("", "wb", 6, target, mtime=0))


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file and put its bytes on the disk before it is closed."""
    with path.open("wb") as target:
        yield target
        target.flush()
        os.fsync(target.fileno())
