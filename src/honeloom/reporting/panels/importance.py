"""Importance of every attention, MLP and block, and what was dropped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import INK, SERIES, Panel, by_name, figure
from honeloom.reporting.text import number
from honeloom.types.report import Report

__all__ = ["importance_panel"]

KINDS = ("attention", "mlp", "block")
_NAMES = {"attention": "attention", "mlp": "MLP", "block": "block"}
WITH_NUMBERS = 16
"""Layers up to which every cell has its importance written in it."""
Row = tuple[str, int, float, float | None, str]


def importance_panel(folder: Path, report: Report) -> Panel | None:
    """Heat map of importances by kind and layer, dropped ones framed; the table has values with standard errors."""
    if not (folder / "scores.json").exists():
        return None
    scores = json.loads((folder / "scores.json").read_bytes())
    plan = _plan(folder)
    rows: list[Row] = [
        (kind, s["layer"], s["value"], s["stderr"], "dropped" if s["layer"] in plan[kind] else "kept")
        for kind in KINDS
        for s in scores[kind]
    ]
    if not rows:
        return None
    gone = [f"{_NAMES[r[0]]} {r[1]}" for r in rows if r[4] == "dropped"]
    metric = plan.get("metric") or report.details.get("metric")
    layers = 1 + max(r[1] for r in rows)
    return Panel(
        title=f"Importance by layer ({metric})",
        columns=("kind", "layer", "importance", "± stderr", "decision"),
        rows=rows,
        figure=_chart(rows, layers),
        note="Darker cells matter more, on a logarithmic scale over all kinds; framed ones were dropped. Empty cells "
        "have no such half, or the metric does not score it. The table has one standard error over rows.",
        alt=f"Heat map of the importance of attention, MLP and block over {layers} layers; "
        f"dropped: {', '.join(gone) or 'none'}",
        file="scores.json",
    )


def _plan(folder: Path) -> Mapping[str, Any]:
    """What was dropped; nothing where importances alone were measured."""
    file = folder / "drop_plan.json"
    found: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
    return {**{kind: [] for kind in KINDS}, **found}


def _chart(rows: Sequence[Row], layers: int) -> dict[str, Any]:
    kinds = [kind for kind in KINDS if any(r[0] == kind for r in rows)]
    values = {(r[0], r[1]): r for r in rows}
    least = min((r[2] for r in rows if r[2] > 0), default=1.0)
    shades = [[_shade(values.get((kind, i)), least) for i in range(layers)] for kind in kinds]
    texts = [[_text(values.get((kind, i)), kind, i) for i in range(layers)] for kind in kinds]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": list(range(layers)),
        "y": list(range(len(kinds))),
        "z": shades,
        "colorscale": [[0, "--raised"], [1, SERIES[0]]],
        "customdata": texts,
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
        "opacity": 0.7,
    }
    if layers <= WITH_NUMBERS:
        written = [[_short(values.get((kind, i))) for i in range(layers)] for kind in kinds]
        trace |= {"text": written, "texttemplate": "%{text}", "textfont": {"color": "--ink", "size": 11}}
    frames = [_frame(r[1], kinds.index(r[0])) for r in rows if r[4] == "dropped"]
    return figure(
        [trace], x="layer", y="", height=110 + 60 * len(kinds), shapes=frames,
        xaxis={"dtick": 1} if layers <= 24 else {"tickformat": "d"},
        yaxis=by_name([_NAMES[kind] for kind in kinds]),
    )  # fmt: skip


def _shade(row: Row | None, least: float) -> float | None:
    """Logarithm of an importance; those of 0 and below are as pale as the least."""
    return None if row is None else math.log10(max(row[2], least))


def _text(row: Row | None, kind: str, layer: int) -> str:
    if row is None:
        return f"{_NAMES[kind]} {layer}: none"
    error = f" ± {number(row[3])}" if row[3] is not None else ""
    return f"{_NAMES[kind]} {layer}: {number(row[2])}{error}, {row[4]}"


def _short(row: Row | None) -> str:
    return "" if row is None else f"{row[2]:.2g}"


def _frame(x: int, y: int) -> dict[str, Any]:
    line = {"color": INK, "width": 2}
    return {"type": "rect", "x0": x - 0.47, "x1": x + 0.47, "y0": y - 0.45, "y1": y + 0.45, "line": line}
