"""The probe at several depths of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from honeloom.reporting.panel import INK, SERIES, Panel, figure
from honeloom.reporting.text import plural
from honeloom.types.report import Report

__all__ = ["depth_sweep_panel"]


def depth_sweep_panel(folder: Path, report: Report) -> Panel | None:
    """Accuracy of the probe by depth, and in the table its loss and calibration; None where one depth was tried."""
    found: list[dict[str, Any]] = sorted(report.details.get("sweep") or (), key=lambda s: float(s["depth"]))
    if not found:
        return None
    depths, right = [s["depth"] for s in found], [s["accuracy"] for s in found]
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "accuracy",
        "x": depths,
        "y": right,
        "marker": {"size": 8},
        "line": {"color": SERIES[0], "width": 2},
        "hovertemplate": "depth %{x:.2~f}: %{y:.1%}<extra></extra>",
    }
    taken = [s for s in found if s.get("chosen")]
    ring = {"symbol": "circle-open", "size": 18, "color": INK, "line": {"color": INK, "width": 2}}
    at = {"x": [s["depth"] for s in taken], "y": [s["accuracy"] for s in taken]}
    chosen = {"type": "scatter", "mode": "markers", "name": "chosen", **at, "marker": ring, "hoverinfo": "skip"}
    return Panel(
        title="The probe by depth",
        columns=("depth", "accuracy", "loss (nats)", "calibration error", "chosen"),
        rows=[
            (float(s["depth"]), s["accuracy"], s["loss"], s["calibration_error"], "chosen" if s.get("chosen") else "")
            for s in found
        ],
        figure=figure(
            [line, *([chosen] if taken else [])], x="depth (share of the model's layers)", y="rows named right",
            height=280, hovermode="closest", yaxis={"tickformat": ".1~%", "zeroline": False},
            xaxis={"zeroline": False, "tickformat": ".2~f"},
        ),
        note="Share of rows whose pseudo-domain a probe names that did not learn from them, by the depth of the states "
        "that it reads; 0 is the input embedding.",
        alt=f"Line chart of the probe's accuracy at {plural(len(found), 'depth')}, "
        f"from {min(right):.1%} to {max(right):.1%}",
    )  # fmt: skip
