"""Training loss by step."""

from __future__ import annotations

from pathlib import Path

from honeloom.reporting.panel import Panel, figure
from honeloom.types.report import Report

__all__ = ["loss_curve_panel"]

WINDOW = 10
TABLE_ROWS = 20


def loss_curve_panel(folder: Path, report: Report) -> Panel | None:
    """Loss of the recorded optimizer steps and its running mean of ten of them."""
    points = report.details["losses"]
    steps, losses = [s for s, _ in points], [x for _, x in points]
    windows = [losses[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(losses))]
    smooth = [sum(w) / len(w) for w in windows]
    raw = {"type": "scatter", "mode": "lines", "name": "step", "x": steps, "y": losses, "opacity": 0.4}
    mean = {"type": "scatter", "mode": "lines", "name": f"mean of {WINDOW}", "x": steps, "y": smooth}
    every = max(1, len(steps) // TABLE_ROWS)
    return Panel(
        title="Training loss",
        columns=("step", "loss (nats/token)", f"mean of {WINDOW}"),
        rows=list(zip(steps, losses, smooth, strict=True))[::every],
        figure=figure([raw, mean], x="optimizer step", y="nats/token"),
    )
