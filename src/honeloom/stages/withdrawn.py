"""Rows that are withdrawn: read as if they were not there, and told by the fingerprints of what held them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from honeloom.config.base import VerbConfig
from honeloom.data.reader import read_file, read_rows
from honeloom.data.sources import RowFile, resolve_sources
from honeloom.errors import InputError, RowsError, SourceError
from honeloom.registry import load_target
from honeloom.runs.atomic import canonical_json
from honeloom.runs.keys import combine_digests
from honeloom.stages.inputs import ResolvedInput, Resolver

__all__ = ["named_in", "read_withdrawn", "resolve_inputs", "withdrawn_fingerprint"]

_MAY_NAME = ("must_drop",)
"""Files that may name a withdrawn row, for they leave it out as well."""


def read_withdrawn(config: VerbConfig) -> frozenset[str]:
    """Ids of the rows that a stage must not read: from its settings, or the file that they name.

    Raises
    ------
    RowsError
        The file cannot be read, or holds no id.
    """
    given: str | tuple[str, ...] = getattr(config, "withdraw", ())
    if not isinstance(given, str):
        return frozenset(given)
    path = Path(os.path.expanduser(given))
    try:
        ids = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(
            f"withdraw {given!r}: cannot be read ({error}); give a text file with an id per line, or a list of ids"
        ) from None
    if not ids:
        raise RowsError(f"withdraw {given!r}: holds no id; leave it out, or write an id per line")
    return frozenset(ids)


def resolve_inputs(
    config: VerbConfig, resolver: Resolver, inputs: Mapping[str, ResolvedInput]
) -> dict[str, ResolvedInput]:
    """The inputs of a stage less the rows that are withdrawn.

    Raises
    ------
    RowsError
        A list or file of rows that is read as a whole names such a row.
    SourceError
        A model of an earlier command was made with such a row.
    """
    gone = read_withdrawn(config)
    if not gone:
        return dict(inputs)
    found = {place: resolver.once(i, gone, _without) if i.kind == "rows" else i for place, i in inputs.items()}
    for i in found.values():
        _require_free(i, gone)
    return found


def _without(found: ResolvedInput, gone: frozenset[str]) -> ResolvedInput:
    """Rows less the withdrawn ones; an input that holds none of them stays as it is, to its fingerprint."""
    held = {file: {row.id or "" for row in read_file(file) if row.id in gone} for file in found.files}
    ids = tuple(sorted({i for some in held.values() for i in some}))
    if not ids:
        return found
    files = tuple(replace(file, without=tuple(sorted(some))) for file, some in held.items())
    return replace(found, files=files, fingerprint=withdrawn_fingerprint(found.fingerprint, ids), withdrawn=ids)


def withdrawn_fingerprint(rows: str, ids: Collection[str]) -> str:
    """Fingerprint of rows without some that they hold."""
    if not ids:
        return rows
    return combine_digests({"rows": rows, "without": hashlib.sha256(canonical_json(sorted(ids)).encode()).hexdigest()})


def _require_free(found: ResolvedInput, gone: frozenset[str]) -> None:
    """Refuse what would bring a withdrawn row in by another way."""
    if found.kind == "file" and found.place not in _MAY_NAME and (named := named_in(found.paths, gone)):
        raise RowsError(f"withdraw: {found.place} {found.value!r} holds the row {named[0]!r}; take it out of that file")
    if found.kind in ("model", "adapter") and not found.relative and found.paths:
        used = load_target("honeloom.stages.row_records:used_ids")(found.paths[0]) & gone
        if used:
            row = min(used)
            raise SourceError(
                f"withdraw: {found.place} {found.value!r} was made with the row {row!r}; make it again without it "
                f"first: honeloom lineage {found.value} --row {row}"
            )


def named_in(paths: Collection[Path], ids: Collection[str]) -> list[str]:
    """Which ids stand in files of ids (.txt) or of rows; none in files that are neither."""
    found: set[str] = set()
    for path in paths:
        try:
            if path.suffix == ".txt":
                found |= {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} & set(ids)
            else:
                found |= {row.id for row in read_rows(_files(path)) if row.id in ids and row.id is not None}
        except (InputError, UnicodeDecodeError):  # an array, a key: no rows
            continue
    return sorted(found)


def _files(path: Path) -> tuple[RowFile, ...]:
    return resolve_sources([str(path)])
