"""Texts of rows that were read but need not have been kept, looked up by id in the input files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from honeloom.data.reader import read_file
from honeloom.data.sources import RowFile, fingerprint, resolve_sources
from honeloom.errors import InputError
from honeloom.types.rows import Row

__all__ = ["find_rows"]

MOST_BYTES = 32 << 20
"""Of all input files together: a page should be written in seconds."""


def find_rows(folder: Path, ids: Collection[str]) -> dict[str, Row]:
    """Rows by id, as far as they can be read cheaply.

    Only the files that `inputs.json` records are read, and only while their content has the
    recorded hash: a file that was moved, changed, or is large gives no row.

    Parameters
    ----------
    folder : Path
        Of the selection.
    ids : collection of str
        Of the rows.
    """
    wanted, found = set(ids), dict[str, Row]()
    for entry in _entries(folder):
        try:
            for row in _rows(folder, entry):
                if row.id in wanted:
                    found.setdefault(row.id, row)
                if len(found) == len(wanted):
                    return found
        except (InputError, OSError):
            continue
    return found


def _entries(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / "inputs.json"
    document = json.loads(path.read_bytes()) if path.exists() else {}
    entries = [e for e in document.get("inputs", ()) if e["place"].partition(".")[0] == "rows"]
    return entries if sum(e["bytes"] or 0 for e in entries) <= MOST_BYTES else []


def _rows(folder: Path, entry: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of one input that are still what they were."""
    files = _files(folder, entry)
    for row in (r for file in files for r in read_file(file)):
        if isinstance(row, Row):
            yield row


def _files(folder: Path, entry: Mapping[str, Any]) -> tuple[RowFile, ...]:
    if entry["relative"]:
        return _of_run(folder, entry)
    names = [str(p) for p in entry["paths"]]
    if not names and str(entry["value"]).startswith("lab:"):
        names = [str(entry["value"])]
    if not names:
        return ()
    files = resolve_sources(names)
    return files if fingerprint(files) == entry["sha256"] else ()


def _of_run(folder: Path, entry: Mapping[str, Any]) -> tuple[RowFile, ...]:
    """What another stage of the same run wrote: beside this stage, nowhere else."""
    place = (folder / entry["relative"]).resolve()
    if not place.is_relative_to(folder.resolve().parent):
        return ()
    return resolve_sources([str(place)])
