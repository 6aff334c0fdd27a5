"""Importance of every sub-layer, and what was dropped."""

from __future__ import annotations

import json
from pathlib import Path

from honeloom.reporting.panel import COLOURS, Panel, figure
from honeloom.types.report import Report

__all__ = ["importance_panel"]


def importance_panel(folder: Path, report: Report) -> Panel | None:
    """Importance of attention, MLP and block per layer with one standard error; dropped ones are crosses."""
    scores = json.loads((folder / "scores.json").read_bytes())
    plan = json.loads((folder / "drop_plan.json").read_bytes())
    rows = [
        (kind, s["layer"], s["value"], s["stderr"], "dropped" if s["layer"] in plan[kind] else "kept")
        for kind in ("attention", "mlp", "block")
        for s in scores[kind]
    ]
    traces = []
    for i, kind in enumerate(("attention", "mlp", "block")):
        mine = [r for r in rows if r[0] == kind]
        gone = [r[4] == "dropped" for r in mine]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": kind,
                "x": [r[1] for r in mine],
                "y": [r[2] for r in mine],
                "error_y": {"type": "data", "array": [r[3] or 0.0 for r in mine], "color": "#808080"},
                "marker": {
                    "color": COLOURS[i],
                    "symbol": ["x" if g else "circle" for g in gone],
                    "size": [15 if g else 7 for g in gone],
                },
                "line": {"width": 1},
            }
        )
    return Panel(
        title=f"Importance ({plan['metric']}); crosses were dropped",
        columns=("kind", "layer", "importance", "stderr", "decision"),
        rows=rows,
        figure=figure(
            traces,
            x="layer",
            y="importance",
            yaxis={"type": "log", "title": {"text": "importance"}, "automargin": True},
        ),
    )
