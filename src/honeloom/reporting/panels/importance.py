"""Importance of every sub-layer, and what was dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import SERIES, SYMBOLS, Panel, figure
from honeloom.types.report import Report

__all__ = ["importance_panel"]

KINDS = ("attention", "mlp", "block")


def importance_panel(folder: Path, report: Report) -> Panel | None:
    """Importance of attention, MLP and block per layer with one standard error; dropped ones are crosses."""
    if not (folder / "scores.json").exists():
        return None
    scores = json.loads((folder / "scores.json").read_bytes())
    plan = json.loads((folder / "drop_plan.json").read_bytes())
    rows = [
        (kind, s["layer"], s["value"], s["stderr"], "dropped" if s["layer"] in plan[kind] else "kept")
        for kind in KINDS
        for s in scores[kind]
    ]
    traces = [_trace(i, kind, [r for r in rows if r[0] == kind]) for i, kind in enumerate(KINDS)]
    values = [r[2] for r in rows if r[2] and r[2] > 0]
    few = len(values) > 1 and max(values) / min(values) < 100
    gone = [f"{r[0]} {r[1]}" for r in rows if r[4] == "dropped"]
    return Panel(
        title=f"Importance by layer ({plan['metric']})",
        columns=("kind", "layer", "importance", "± stderr", "decision"),
        rows=rows,
        figure=figure(
            traces, x="layer", y="importance (log scale)", height=380,
            yaxis={"type": "log", "exponentformat": "power", "dtick": "D2" if few else 1},
            xaxis={"dtick": 1} if len(scores["block"]) <= 24 else {"tickformat": "d"},
        ),
        note="Large crosses were dropped: the least important ones. Bars are one standard error.",
        alt=f"Line chart of the importance of attention, MLP and block over {len(scores['block'])} layers; "
        f"dropped: {', '.join(gone) or 'none'}",
        file="scores.json",
    )  # fmt: skip


def _trace(i: int, kind: str, rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    gone = [r[4] == "dropped" for r in rows]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": kind,
        "x": [r[1] for r in rows],
        "y": [r[2] for r in rows],
        "error_y": {"type": "data", "array": [r[3] or 0.0 for r in rows], "color": SERIES[i], "thickness": 1},
        "marker": {"symbol": ["x" if g else SYMBOLS[i] for g in gone], "size": [15 if g else 7 for g in gone]},
        "line": {"width": 1.2, "color": SERIES[i]},
        "hovertemplate": f"{kind} %{{x}}: %{{y:.4g}}<extra></extra>",
    }
