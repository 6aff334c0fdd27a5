"""Training loss by step."""

from __future__ import annotations

from pathlib import Path

from honeloom.reporting.panel import GREY, ROWS_SHOWN, SERIES, Panel, figure
from honeloom.reporting.text import number
from honeloom.types.report import Report

__all__ = ["loss_curve_panel"]

WINDOW = 10


def loss_curve_panel(folder: Path, report: Report) -> Panel | None:
    """Loss of the recorded optimizer steps and its running mean of ten of them."""
    points = [(s, x) for s, x in report.details["losses"] if x is not None]
    if not points:
        return None
    steps, losses = [s for s, _ in points], [x for _, x in points]
    windows = [losses[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(losses))]
    smooth = [sum(w) / len(w) for w in windows]
    line = {"type": "scatter", "mode": "lines", "x": steps, "hovertemplate": "step %{x}: %{y:.4f}<extra></extra>"}
    raw = {**line, "name": "one step", "y": losses, "line": {"color": GREY, "width": 1}}
    mean = {**line, "name": f"mean of {WINDOW}", "y": smooth, "line": {"color": SERIES[0], "width": 2.5}}
    every = -(-len(steps) // ROWS_SHOWN)
    told = f" The table has every {every}th point; report.json has all {len(steps):,}." if every > 1 else ""
    return Panel(
        title="Training loss",
        columns=("step", "loss (nats/token)", f"mean of {WINDOW}"),
        rows=list(zip(steps, losses, smooth, strict=True))[::every],
        figure=figure([raw, mean], x="optimizer step", y="nats/token", yaxis={"rangemode": "tozero"}),
        note=f"On the rows trained on; rows held out tell more.{told}",
        alt=f"Line chart of the training loss over {steps[-1]} steps; its mean of {WINDOW} steps goes "
        f"from {number(losses[0])} to {number(smooth[-1])}",
    )
