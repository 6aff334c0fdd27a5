"""Metrics by domain, with error bars."""

from __future__ import annotations

from pathlib import Path

from honeloom.reporting.panel import Panel, figure
from honeloom.types.report import Report

__all__ = ["metrics_panel"]


def metrics_panel(folder: Path, report: Report) -> Panel | None:
    """Loss (or the first metric there is) by domain, with one standard error; the table has all metrics."""
    if not report.metrics:
        return None
    name = next((m.name for m in report.metrics if m.name == "loss"), report.metrics[0].name)
    shown = [m for m in report.metrics if m.name == name]
    errors = [m.stderr or 0.0 for m in shown]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [m.value for m in shown],
        "y": [m.domain or "all" for m in shown],
        "error_x": {"type": "data", "array": errors, "color": "#808080"},
    }
    height = 120 + 26 * len(shown)
    return Panel(
        title=f"{name} by domain",
        columns=("metric", "domain", "value", "stderr", "n", "unit"),
        rows=[(m.name, m.domain, m.value, m.stderr, m.n, m.unit) for m in report.metrics],
        figure=figure(
            [trace],
            x=f"{name} ({shown[0].unit})",
            y="",
            height=height,
            yaxis={"autorange": "reversed", "automargin": True},
        ),
    )
