"""What the panels of a valuation read: the table of clusters, columns that may be absent, and words for v."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from honeloom.types.report import Report

__all__ = ["best_first", "has_domains", "label_of_clusters", "read_columns", "told_v", "unit_of"]


def read_columns(path: Path, needed: Sequence[str], more: Sequence[str] = ()) -> pa.Table | None:
    """The columns `needed`, and those of `more` that there are; None without the file, a needed column, or rows."""
    if not path.exists():
        return None
    names = pq.read_schema(path).names
    if not set(needed) <= set(names):
        return None
    table = pq.read_table(path, columns=[n for n in dict.fromkeys((*needed, *more)) if n in names])
    return table if len(table) else None


def best_first(folder: Path) -> list[dict[str, Any]]:
    """Clusters that have a value, the highest first; none where nothing was valued in clusters."""
    table = read_columns(
        folder / "clusters.parquet", ("cluster", "value"), ("size", "proxy_id", "stderr", "p_select", "count")
    )
    known = [c for c in table.to_pylist() if c["value"] is not None] if table is not None else []
    return sorted(known, key=lambda c: (-c["value"], c["cluster"]))


def has_domains(folder: Path) -> bool:
    """Whether the rows were scored one by one within pseudo-domains, rather than by the value of their cluster."""
    return read_columns(folder / "scores.parquet", ("pseudo_domain",)) is not None


def label_of_clusters(folder: Path) -> dict[int, str]:
    """What clusters are called where they are the rows of one domain, or one source; else none has a name."""
    for kind in ("domain", "source"):
        table = read_columns(folder / "scores.parquet", ("cluster", kind), ("x",))
        if table is None or "x" in table.column_names:
            continue
        table = table.filter(table["cluster"].is_valid())
        pairs = table.group_by(["cluster", kind], use_threads=False).aggregate([]).to_pylist()
        names = {p["cluster"]: p[kind] or "(none)" for p in pairs}
        if len(names) == len(pairs) == len(set(names.values())) > 0:
            return names
    return {}


def unit_of(report: Report) -> str:
    """Unit of v: a mean loss is never negative, so that of its negative is told from a share."""
    known = [v for v in (report.details.get("empty"), report.details.get("full")) if v is not None]
    if not known:
        return ""
    return "nats/token" if min(known) < 0 else "share right"


def told_v(report: Report) -> str:
    """What v measures, as the end of a sentence."""
    return {
        "nats/token": "the negative loss per token of the development rows, in nats",
        "share right": "the accuracy on the development rows",
    }.get(unit_of(report), "the score of a tuned model on the development rows")
