"""Rows of the pool at both ends of a valuation, kept or not, to be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from honeloom.reporting.panel import Panel
from honeloom.reporting.row_texts import find_rows
from honeloom.reporting.valuation import best_first, read_columns
from honeloom.types.report import Report

__all__ = ["pool_rows_panel"]

EACH = 10
PER_CLUSTER = 2
"""Rows of a cluster share its value: more of them would only push other clusters out."""
TEXT = 160


def pool_rows_panel(folder: Path, report: Report) -> Panel | None:
    """Rows of the best and of the worst clusters, nearest to their middles first; None without a valuation.

    Where every row has a value of its own, the rows at both ends of it; a distance from a band is
    no such value.
    """
    needed, more = ("id", "score", "cluster", "selected"), ("distance", "x", "pseudo_domain")
    table = read_columns(folder / "scores.parquet", needed, more) if best_first(folder) else None
    if table is None or report.details["method"] == "band":
        return None
    own = "pseudo_domain" in table.column_names
    scores = table["score"].to_numpy().astype(float)
    known = np.flatnonzero(np.isfinite(scores))
    distance = np.zeros(len(scores))
    if "distance" in table.column_names:
        distance = np.nan_to_num(table["distance"].to_numpy().astype(float), nan=np.inf)
    clusters = table["cluster"].to_pylist()
    most = EACH if own else PER_CLUSTER
    takers = sum(min(n, most) for n in Counter(clusters[i] for i in known).values())
    each = min(EACH, takers // 2)  # no row stands at both ends
    top = _first(known[np.lexsort((distance[known], -scores[known]))], clusters, each, most)
    rest = np.setdiff1d(known, top)
    bottom = _first(rest[np.lexsort((distance[rest], scores[rest]))], clusters, each, most)
    ends = [*top, *reversed(bottom)]
    if not ends:
        return None
    picked = table.take(ends).to_pylist()
    found = find_rows(folder, {row["id"] for row in picked})
    lost = len({row["id"] for row in picked}) - len(found)
    # Groups by label have no middle: distances are only numbers that break ties there.
    nearest = ": those nearest to its middle" if "x" in table.column_names else ""
    unread = " Texts are missing where the input file has moved, changed, or is large." if lost else ""
    texts = ("question or text", "answer") if found else ()
    order = f"From the best clusters downwards, then the worst, at most {PER_CLUSTER} rows of each{nearest}."
    if own:
        order = "From the highest value downwards, then the lowest."
    return Panel(
        title="Rows of the pool at both ends of the values",
        columns=("end", "value", *texts, "pseudo-domain" if own else "cluster", "decision", "id"),
        rows=[_row(row, end, found) for row, end in zip(picked, ["highest"] * each + ["lowest"] * each, strict=True)],
        note=f"{order} Texts end after {TEXT} characters.{unread}",
        file="scores.parquet",
    )


def _first(order: Iterable[Any], clusters: list[int | None], each: int, most: int) -> list[int]:
    """The first rows of an order, at most so many of each cluster."""
    taken: Counter[int | None] = Counter()
    picked: list[int] = []
    for i in map(int, order):
        if taken[clusters[i]] < most:
            taken[clusters[i]] += 1
            picked.append(i)
        if len(picked) == each:
            break
    return picked


def _row(row: dict[str, Any], end: str, found: dict[str, Any]) -> tuple[Any, ...]:
    text = found.get(row["id"])
    texts = (text.prompt[:TEXT], text.response[:TEXT]) if text else ("", "")
    cells = (row.get("pseudo_domain", row["cluster"]), "kept" if row["selected"] else "left out", row["id"])
    return (end, row["score"], *(texts if found else ()), *cells)
