"""Scores of a selection, and what was kept of each group."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from honeloom.reporting.panel import GREY, Panel, by_name, figure, row_height, vertical_line
from honeloom.reporting.text import number, plural
from honeloom.types.report import Report

__all__ = ["kept_panel", "scores_panel"]

BINS = 40
GROUPS = 30


def scores_panel(folder: Path, report: Report) -> Panel | None:
    """Histogram of scores, kept and left out; None where all are missing or equal.

    The outermost 5 % on each side are counted in the first and the last bar.
    """
    table = pq.read_table(folder / "scores.parquet", columns=["score", "selected"])
    known = table.filter(table["score"].is_valid())
    scores, selected = known["score"].to_numpy().astype(float), known["selected"].to_numpy()
    if len(scores) == 0 or scores.min() == scores.max():
        return None
    ranked = np.sort(scores)
    low, high = float(ranked[len(ranked) // 20]), float(ranked[-1 - len(ranked) // 20])
    width = (high - low) / BINS or 1.0
    bins = np.clip((scores - low) / width, 0, BINS - 1).astype(int)
    kept, left = (np.bincount(bins[selected == k], minlength=BINS).tolist() for k in (True, False))
    edges = [low + i * width for i in range(BINS)]
    middle = [e + width / 2 for e in edges]
    hover = "around %{x:.4g}: %{y} rows<extra></extra>"
    traces: list[dict[str, Any]] = [
        {"type": "bar", "name": name, "x": middle, "y": counts, "hovertemplate": hover}
        for name, counts in (("kept", kept), ("left out", left))
    ]
    traces[1]["marker"] = {"color": GREY}
    missing = len(table) - len(known)
    unscored = f" {plural(missing, 'row')} without a score stand in neither." if missing else ""
    return Panel(
        title=f"Scores of {report.details['method']}",
        columns=("score from", "to", "kept", "left out"),
        rows=[(e, e + width, k, n) for e, k, n in zip(edges, kept, left, strict=True)],
        figure=figure(traces, x="score", y="rows", barmode="stack", bargap=0.05),
        note=f"The first and the last bar also count the outermost 5% on their side.{unscored}",
        alt=f"Histogram of {len(known):,} scores from {number(low)} to {number(high)}, kept and left out",
        file="scores.parquet",
    )


def kept_panel(folder: Path, report: Report) -> Panel | None:
    """Share kept of every domain (or source), largest groups first."""
    table = pq.read_table(folder / "scores.parquet", columns=["domain", "source", "selected"])
    by = "domain" if table["domain"].null_count < len(table) else "source"
    counts = table.group_by([by, "selected"], use_threads=False).aggregate([([], "count_all")]).to_pylist()
    total: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for row in counts:
        group = row[by] or "(none)"
        total[group] += row["count_all"]
        kept[group] += row["count_all"] * row["selected"]
    names = [g for g, _ in total.most_common()]
    shown = names[:GROUPS]
    shares = [kept[g] / total[g] for g in names]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": shares[:GROUPS],
        "y": list(range(len(shown))),
        "text": shown,
        "textposition": "none",
        "hovertemplate": "%{text}: %{x:.1%}<extra></extra>",
    }
    overall = sum(kept.values()) / sum(total.values())
    rest = f" The chart has the {len(shown)} largest of {len(names):,} groups." if len(names) > len(shown) else ""
    return Panel(
        title=f"Share kept by {by}",
        columns=(by, "rows", "kept", "share"),
        rows=[(g, total[g], kept[g], s) for g, s in zip(names, shares, strict=True)],
        figure=figure(
            [trace], x="share kept", y="", height=row_height(len(shown)), shapes=[vertical_line(overall)],
            xaxis={"tickformat": ".0%", "rangemode": "tozero"}, yaxis=by_name(shown),
        ),
        note=f"The dotted line is the share over all rows, {overall:.1%}.{rest}",
        alt=f"Bar chart of the share kept in {len(shown)} groups, from {min(shares):.0%} to {max(shares):.0%}",
        file="scores.parquet",
    )  # fmt: skip
