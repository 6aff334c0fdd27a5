"""Scores of an earlier selection, applied to these rows by their ids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from honeloom.errors import SourceError
from honeloom.selection import sampling as drawing
from honeloom.selection.domain_tables import finite_or_none
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData
from honeloom.valuation.stopping import spearman

__all__ = ["scores"]

BATCH = 65_536
NUMBERS = ("score", "stderr", "rank")
"""Columns of numbers; only the first must be there."""


@dataclass
class _Found:
    """What the file says of each of N rows; NaN where it says nothing."""

    known: npt.NDArray[np.bool_]
    numbers: dict[str, npt.NDArray[np.float64]]
    clusters: list[Any] | None
    repeated: int = 0


def scores(
    data: SelectionData, *, path: str, term: str | None = None, weight: float = 1.0,
    standardise: Literal["z", "rank"] = "z",
) -> Scores:  # fmt: skip
    """Read a scores.parquet and give every row the score of its id; no model is run.

    Higher scores are better, as `select` writes them. Rows that the file does not name, or has
    no score for, are -inf and come last. Where the file has a column `rank`, the rows are
    taken by it, the lowest first; rows without one follow by their scores. The file is read in
    pieces.

    With a `term`, the score is that of the first file plus `weight` times that of the second,
    both standardised over the rows that both know; ranks and standard errors are then gone.

    Parameters
    ----------
    data : SelectionData
        Only the rows' ids are used.
    path : str
        A Parquet file with the columns id and score, and perhaps stderr, cluster and rank.
        Where it names an id twice, the first entry counts.
    term, weight, standardise
        As in `ScoresConfig`.

    Raises
    ------
    SourceError
        The file is not readable Parquet, lacks a column or has one of another type, or names
        none of these rows.
    """
    found = _told(data, path)
    value = np.where(np.isfinite(found.numbers["score"]), found.numbers["score"], -math.inf)
    columns = {} if found.clusters is None else {"cluster": found.clusters}
    if term is None:
        return Scores(
            tuple(value.tolist()),
            higher_is_better=True,
            method="scores",
            stderr=_errors(found.numbers.get("stderr")),
            columns=columns or None,
            order=_order(found.numbers.get("rank"), value, data.rows.ids),
        )
    other = _told(data, term).numbers["score"]
    known = np.isfinite(value) & np.isfinite(other)
    if not known.any():
        raise SourceError(f"{path} and {term} have no row with a score in both; give scores of the same rows")
    total = np.full(len(value), -math.inf)
    parts = [drawing.standardise(part[known], standardise) for part in (value, other)]
    total[known] = parts[0] + weight * parts[1]
    agreement = spearman(value[known], other[known])
    data.say(f"scores: {int(known.sum())} rows have both scores, whose rank correlation is {agreement:.2f}")
    return Scores(
        tuple(total.tolist()), True, "scores",
        columns={**columns, "base": finite_or_none(value), "term": finite_or_none(other)},
        details={"term": {"weight": weight, "standardise": standardise, "rows": int(known.sum()),
                          "rank_correlation": agreement}},
    )  # fmt: skip


def _told(data: SelectionData, path: str) -> _Found:
    """What a file says of the rows; what it does not say is told."""
    ids = data.rows.ids
    found = _read(Path(path), ids)
    if not found.known.any():
        raise SourceError(
            f"{path}: names none of the {len(ids)} rows by id; give the rows it was made from, or rows that hold "
            "the same column id"
        )
    if missing := int((~found.known).sum()):
        data.say(f"scores: {missing} of {len(ids)} rows are not named in {path}; they come last")
    if found.repeated:
        data.warn(f"{path}: {found.repeated} entries repeat an id; the first of each counts")
    return found


def _errors(stderr: npt.NDArray[np.float64] | None) -> tuple[float, ...] | None:
    """Standard errors, infinite where unknown; None where none is known."""
    if stderr is None or not np.isfinite(stderr).any():
        return None
    return tuple(np.where(np.isnan(stderr), math.inf, stderr).tolist())


def _order(rank: npt.NDArray[np.float64] | None, value: npt.NDArray[np.float64], ids: Any) -> list[int] | None:
    """All rows by rank, then by score, ties to the lowest id; None where no rank is known."""
    if rank is None or np.isnan(rank).all():
        return None
    filled = np.where(np.isnan(rank), math.inf, rank)
    return sorted(range(len(ids)), key=lambda i: (filled[i], -value[i], ids[i]))


def _read(file: Path, ids: Any) -> _Found:
    places: dict[str, list[int]] = {}
    for i, name in enumerate(ids):
        places.setdefault(name, []).append(i)
    if not file.is_file():
        raise SourceError(f"{file}: no such file; give a scores.parquet of `select`")
    try:
        with pq.ParquetFile(file) as table:
            return _gather(table, _columns(file, table.schema_arrow), places, len(ids))
    except (OSError, pa.ArrowException) as error:
        why = str(error).splitlines()[0]
        raise SourceError(f"{file}: not a readable Parquet file ({why}); give a scores.parquet of `select`") from None


def _columns(file: Path, schema: Any) -> list[str]:
    """Those to read, checked."""
    lacking = [name for name in ("id", "score") if name not in schema.names]
    if lacking:
        raise SourceError(
            f"{file}: has no column {' and no column '.join(lacking)} (columns: {', '.join(schema.names) or 'none'}); "
            "give a scores.parquet of `select`, or a table with the columns id and score"
        )
    for name in NUMBERS:
        kind = schema.field(name).type if name in schema.names else pa.null()
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise SourceError(f"{file}: column {name} holds {kind}, expected numbers; write them as float64")
    kind = schema.field("id").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SourceError(f"{file}: column id holds {kind}, expected text; write the ids as strings")
    return ["id", "score", *(name for name in ("stderr", "cluster", "rank") if name in schema.names)]


def _gather(table: Any, columns: list[str], places: dict[str, list[int]], n: int) -> _Found:
    numbers = {name: np.full(n, math.nan) for name in columns if name in NUMBERS}
    found = _Found(np.zeros(n, dtype=np.bool_), numbers, [None] * n if "cluster" in columns else None)
    seen: set[str] = set()
    for batch in table.iter_batches(batch_size=BATCH, columns=columns):
        values = {name: batch.column(name).to_pylist() for name in columns}
        for entry, name in enumerate(values["id"]):
            if name not in places:
                continue
            found.repeated += name in seen
            if name not in seen:
                _put(found, places[name], {column: values[column][entry] for column in columns})
            seen.add(name)
    if found.clusters is not None and all(c is None for c in found.clusters):
        found.clusters = None
    return found


def _put(found: _Found, rows: list[int], entry: dict[str, Any]) -> None:
    found.known[rows] = True
    for name, array in found.numbers.items():
        if entry[name] is not None:
            array[rows] = entry[name]
    if found.clusters is not None:
        for i in rows:
            found.clusters[i] = entry["cluster"]
