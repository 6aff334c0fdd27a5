"""Training loss by step."""

from __future__ import annotations

from pathlib import Path

from honeloom.reporting.panel import Panel, figure
from honeloom.types.report import Report

__all__ = ["loss_curve_panel"]

POINTS = 1000


def loss_curve_panel(folder: Path, report: Report) -> Panel | None:
    """Loss of every optimizer step (thinned to 1,000 points) and its running mean of ten."""
    losses = list(report.details["losses"])
    if not losses:
        return None
    stride = max(1, len(losses) // POINTS)
    steps = list(range(1, len(losses) + 1))[::stride]
    smooth = [sum(losses[max(0, s - 10) : s]) / len(losses[max(0, s - 10) : s]) for s in steps]
    raw = {"type": "scatter", "mode": "lines", "name": "step", "x": steps, "y": losses[::stride], "opacity": 0.4}
    mean = {"type": "scatter", "mode": "lines", "name": "mean of 10", "x": steps, "y": smooth}
    table = [(s, losses[s - 1], m) for s, m in zip(steps, smooth, strict=True)]
    every = max(1, len(table) // 20)
    return Panel(
        title="Training loss",
        columns=("step", "loss (nats/token)", "mean of 10"),
        rows=table[::every],
        figure=figure([raw, mean], x="optimizer step", y="nats/token"),
    )
