"""Which rows a stage touched: small Parquet records beside the artefact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from honeloom.data.overlap import question_digest
from honeloom.stages.inputs import recorded_inputs
from honeloom.types.rows import Row

__all__ = [
    "CALIBRATION_FILE",
    "ROWS_FILE",
    "TARGET_FILE",
    "ancestors",
    "find_row",
    "parents",
    "target_digests",
    "through",
    "used_ids",
    "training_digests",
    "write_questions",
    "write_table",
]

ROWS_FILE = "training_rows.parquet"
CALIBRATION_FILE = "calibration_rows.parquet"
TARGET_FILE = "target_rows.parquet"


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write columns as Parquet with stable bytes."""
    pq.write_table(pa.table(columns), path, compression="zstd")


def write_questions(path: Path, rows: Iterable[Row]) -> None:
    """Record id and question digest of rows: for lineage and overlap checks, no text."""
    ids, digests = [], []
    for row in rows:
        ids.append(row.id)
        digests.append(question_digest(row))
    write_table(path, {"id": ids, "question": pa.array(digests, pa.binary())})


def find_row(folder: Path, row_id: str) -> str | None:
    """What a stage did with a row, or None.

    Trained or calibrated on, chosen by (a row of the target), (not) selected, rejected: why, evaluated on.
    """
    if _has(folder / ROWS_FILE, row_id):
        return "trained on"
    if _has(folder / CALIBRATION_FILE, row_id):
        return "calibrated on"
    if _has(folder / TARGET_FILE, row_id):
        return "chosen by"
    if (folder / "scores.parquet").exists():
        table = pq.read_table(folder / "scores.parquet", columns=["id", "selected"], filters=[("id", "=", row_id)])
        if table.num_rows:
            return "selected" if table["selected"][0].as_py() else "not selected"
    if (folder / "rejected.parquet").exists():
        table = pq.read_table(folder / "rejected.parquet", filters=[("id", "=", row_id)])
        if table.num_rows:
            return f"rejected: {table['reason'][0].as_py()}"
    return "evaluated on" if _has(folder / "examples.parquet", row_id) else None


def used_ids(model: Path) -> set[str]:
    """Ids of the rows that a model, or any model it was made from, was trained, calibrated or searched on."""
    found: set[str] = set()
    for folder in ancestors(model):
        for name in (ROWS_FILE, CALIBRATION_FILE):
            if (folder / name).exists():
                found.update(pq.read_table(folder / name, columns=["id"])["id"].to_pylist())
    return found


def through(folder: Path, row_id: str) -> list[str]:
    """Names of the models that a stage read and that a row had a part in, however far back."""
    touched = ("trained on", "calibrated on")
    found = [name for name, model in parents(folder) if any(find_row(a, row_id) in touched for a in ancestors(model))]
    return list(dict.fromkeys(found))


def _has(path: Path, row_id: str) -> bool:
    return path.exists() and pq.read_table(path, columns=["id"], filters=[("id", "=", row_id)]).num_rows > 0


def training_digests(model: Path) -> set[bytes]:
    """Question digests of every row that a model, or any model it was made from, was tuned on.

    Follows the chain of `inputs.json` as far as the folders still exist.
    """
    return _questions(folder / ROWS_FILE for folder in ancestors(model))


def target_digests(model: Path) -> set[bytes]:
    """Question digests of the rows by which the training rows of a model, or of its ancestors, were chosen."""
    seen: set[Path] = set()
    stack = [place for folder in ancestors(model) for place in _rows_read(folder)]
    while stack:
        place = stack.pop()
        if place not in seen:
            seen.add(place)
            stack += _rows_read(place)  # rows chosen from chosen rows, or by the scores of another choice
    return _questions(place / TARGET_FILE for place in sorted(seen))


def _rows_read(folder: Path) -> list[Path]:
    """Folders of the rows, and of the scores of rows, that a stage read."""
    found = []
    for entry in recorded_inputs(folder):
        if entry["kind"] in ("rows", "scores"):
            places = [folder / entry["relative"]] if entry["relative"] else [Path(p) for p in entry["paths"]]
            found += [(p if p.is_dir() else p.parent).resolve() for p in places]
    return found


def _questions(files: Iterable[Path]) -> set[bytes]:
    found: set[bytes] = set()
    for file in files:
        if file.exists():
            column = pq.read_table(file, columns=["question"])["question"]
            found.update(d for d in column.to_pylist() if d is not None)
    return found


def ancestors(model: Path) -> Iterator[Path]:
    """Yield a model's folder and those of the models it was made from, as far as they still exist."""
    seen: set[Path] = set()
    stack = [model.resolve()]
    while stack:
        folder = stack.pop()
        if folder in seen:
            continue
        seen.add(folder)
        yield folder
        stack += [p for _, p in parents(folder)]


def parents(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and folder of every model that a stage read and that still exists.

    The name is the stage's within a run, else as the user wrote it.
    """
    for entry in recorded_inputs(folder):
        if entry["kind"] not in ("model", "adapter"):
            continue
        relative = entry["relative"]
        name = Path(relative).name.split("-", 1)[-1] if relative else entry["value"]
        places = [folder / relative] if relative else [Path(p) for p in entry["paths"]]
        yield from ((name, p.resolve()) for p in places if p.is_dir())
