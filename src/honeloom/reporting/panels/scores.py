"""Scores of a selection, and what was kept of each group."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from honeloom.reporting.panel import Panel, figure
from honeloom.types.report import Report

__all__ = ["kept_panel", "scores_panel"]

BINS = 40
GROUPS = 30


def _columns(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    table = pq.read_table(folder / "scores.parquet", columns=names)
    return {n: table[n].to_pylist() for n in names}


def scores_panel(folder: Path, report: Report) -> Panel | None:
    """Histogram of scores, kept and left out; None where all are missing or equal.

    The outermost 5 % on each side are counted in the first and the last bar.
    """
    data = _columns(folder, ["score", "selected"])
    known = [(s, k) for s, k in zip(data["score"], data["selected"], strict=True) if s is not None]
    if not known or min(known)[0] == max(known)[0]:
        return None
    ranked = sorted(s for s, _ in known)
    low, high = ranked[len(ranked) // 20], ranked[-1 - len(ranked) // 20]
    width = (high - low) / BINS or 1.0
    counts = Counter((max(0, min(BINS - 1, int((s - low) / width))), k) for s, k in known)
    edges = [low + i * width for i in range(BINS)]
    traces = [
        {"type": "bar", "name": name, "x": edges, "y": [counts[i, kept] for i in range(BINS)]}
        for name, kept in (("kept", True), ("left out", False))
    ]
    return Panel(
        title=f"Scores of {report.details['method']}",
        columns=("score from", "kept", "left out"),
        rows=[(e, counts[i, True], counts[i, False]) for i, e in enumerate(edges)],
        figure=figure(traces, x="score", y="rows", barmode="stack"),
    )


def kept_panel(folder: Path, report: Report) -> Panel | None:
    """Share kept of every domain (or source), largest groups first."""
    data = _columns(folder, ["domain", "source", "selected"])
    by = "domain" if any(d is not None for d in data["domain"]) else "source"
    total = Counter(g or "(none)" for g in data[by])
    kept = Counter(g or "(none)" for g, k in zip(data[by], data["selected"], strict=True) if k)
    groups = [g for g, _ in total.most_common(GROUPS)]
    shares = [kept[g] / total[g] for g in groups]
    trace = {"type": "bar", "orientation": "h", "x": shares, "y": groups}
    overall = sum(kept.values()) / sum(total.values())
    line = {
        "type": "line",
        "x0": overall,
        "x1": overall,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"dash": "dot", "color": "#808080"},
    }
    return Panel(
        title=f"Share kept by {by}",
        columns=(by, "rows", "kept", "share"),
        rows=[(g, total[g], kept[g], s) for g, s in zip(groups, shares, strict=True)],
        figure=figure(
            [trace], x="share kept (dotted: overall)", y="", height=120 + 26 * len(groups), shapes=[line],
            yaxis={"autorange": "reversed", "automargin": True},
        ),
    )  # fmt: skip
