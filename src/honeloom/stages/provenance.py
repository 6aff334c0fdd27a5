"""What is known of a stage's sources: their licences, how many rows they hold, and which hub models they go back to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from honeloom import lab
from honeloom.config.load import read_yaml
from honeloom.data import optional
from honeloom.data.sources import RowFile
from honeloom.errors import ConfigError
from honeloom.reporting.card import Facts
from honeloom.reporting.licences import UNKNOWN
from honeloom.stages.inputs import ResolvedInput, adapter_base, recorded_inputs
from honeloom.stages.row_records import ancestors

__all__ = ["facts_of", "hub_parents", "licences_of"]

_LAB = "apache-2.0"
_FRONT = 100_000
_CLIMB = 4
"""Folders between a row file and the root of its hub snapshot."""


def facts_of(inputs: Iterable[ResolvedInput]) -> dict[str, Facts]:
    """Facts of sources, by their fingerprints."""
    return {i.fingerprint: Facts(licences_of(i), _rows(i), len(i.files), len(i.withdrawn)) for i in inputs}


def licences_of(found: ResolvedInput) -> tuple[str, ...]:
    """Licences of a source as its card tells them, or of what it was made from; (`unknown`,) where none is told."""
    if found.value.startswith("lab:"):
        return (_LAB,)
    union: set[str] = set()
    for place in [*found.paths, *([found.base] if found.base else [])]:
        union |= set(_licences_at(place, climb=_CLIMB if found.revision else 0))
    return tuple(sorted(union or {UNKNOWN}))


def _licences_at(path: Path, climb: int) -> list[str]:
    if path == lab.base_path():
        return [_LAB]
    folder = path if path.is_dir() else path.parent
    if recorded := recorded_inputs(folder):  # one of ours: what it was made from
        return [licence for entry in recorded for licence in entry.get("licences", [UNKNOWN])]
    for place in [folder, *folder.parents][: 1 + climb]:
        if told := _from_card(place / "README.md"):
            return told
        if place.parent.name == "snapshots":
            break
    return []


def _from_card(path: Path) -> list[str]:
    """The licences in the front matter of a card."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(_FRONT)
    parts = text.split("---\n", 2)
    if parts[0].strip() or len(parts) < 3:
        return []
    try:
        front: Mapping[str, Any] = read_yaml(parts[1], what=str(path))
    except ConfigError:  # a card that others wrote may hold anything
        return []
    given = front.get("license")
    named = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    if given == "other" and isinstance(front.get("license_name"), str):
        named = [front["license_name"]]
    return [str(name).strip().lower() for name in named if str(name).strip()]


def _rows(found: ResolvedInput) -> int | None:
    """Rows of a source, before any is left out; None where counting would mean reading them all again."""
    counts = [_count(file) for file in found.files]
    known = [n for n in counts if n is not None]
    return sum(known) if counts and len(known) == len(counts) else None


def _count(file: RowFile) -> int | None:
    if file.format == "lab":
        return sum(1 for _ in optional.lab_rows(file.split))
    if file.format == "parquet" and file.path.suffix == ".parquet":
        return int(pq.ParquetFile(file.path).metadata.num_rows)
    if file.format == "jsonl" and not file.compression:
        with open(file.path, "rb") as stream:
            return sum(1 for line in stream if line.strip())
    return None


def hub_parents(inputs: Iterable[ResolvedInput]) -> list[str]:
    """Hub models that the models among the sources are, or go back to; sorted."""
    return sorted({name for i in inputs if i.kind in ("model", "adapter") and i.place != "against" for name in _hub(i)})


def _hub(found: ResolvedInput) -> Iterator[str]:
    if found.revision:
        yield found.value.partition("@")[0]
        return
    for folder in (a for path in found.paths for a in ancestors(path)):
        for entry in recorded_inputs(folder):
            if entry["kind"] in ("model", "adapter") and entry["revision"] and entry["place"] != "against":
                yield str(entry["value"]).partition("@")[0]
        if (folder / "adapter_config.json").is_file() and not recorded_inputs(folder):
            base = adapter_base(folder)
            if base and not Path(base).exists() and "/" in base:
                yield base.partition("@")[0]
