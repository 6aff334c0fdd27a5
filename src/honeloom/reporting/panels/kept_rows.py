"""The kept rows with the highest and the lowest scores, to be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from honeloom.data.reader import read_file
from honeloom.data.sources import resolve_sources
from honeloom.reporting.panel import Panel
from honeloom.types.report import Report
from honeloom.types.rows import Row

__all__ = ["kept_rows_panel"]

EACH = 5
TEXT = 160


def kept_rows_panel(folder: Path, report: Report) -> Panel | None:
    """Five kept rows from each end of the scores; None where fewer were kept or scores are missing."""
    table = pq.read_table(folder / "scores.parquet", columns=["score", "selected", "domain", "source"])
    table = table.filter(table["selected"])
    scores = table["score"].to_numpy().astype(float)
    known = np.flatnonzero(np.isfinite(scores))
    if len(known) < 2 * EACH or report.artefact is None:
        return None
    order = known[np.argsort(-scores[known], kind="stable")]
    ends = [*order[:EACH], *order[-EACH:]]
    # The k-th selected line of scores.parquet is the k-th row of the selected file.
    file = resolve_sources([str(folder / Path(report.artefact.path).name)])[0]
    lines = np.array(sorted(ends), dtype=np.int64) + 1
    found = {r.where.line - 1: r for r in read_file(file, lines) if isinstance(r, Row)}
    groups = [g["domain"] or g["source"] for g in table.take(ends).to_pylist()]
    rows = [
        (float(scores[k]), group, found[k].prompt[:TEXT], found[k].response[:TEXT])
        for k, group in zip(map(int, ends), groups, strict=True)
        if k in found
    ]
    return Panel(
        title="Kept rows at both ends of the scores",
        columns=("score", "group", "question or text", "answer"),
        rows=rows,
        note=f"The {EACH} highest and the {EACH} lowest of {len(scores):,} kept rows; "
        f"texts end after {TEXT} characters.",
        file=file.path.name,
    )
