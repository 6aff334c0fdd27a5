"""The paired comparison with another model."""

from __future__ import annotations

from pathlib import Path

from honeloom.reporting.panel import Panel, figure
from honeloom.types.report import Report

__all__ = ["comparison_panel"]


def comparison_panel(folder: Path, report: Report) -> Panel | None:
    """Difference per domain with its 95 % bootstrap interval; None without `--against`."""
    against = report.details.get("against")
    if not against:
        return None
    parts = {"all": {k: against[k] for k in ("difference", "ci95", "n")}, **against["domains"]}
    rows = [(d, p["difference"], p["ci95"][0], p["ci95"][1], p["n"]) for d, p in parts.items()]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [r[1] for r in rows],
        "y": [r[0] for r in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [r[3] - r[1] for r in rows],
            "arrayminus": [r[1] - r[2] for r in rows],
            "color": "#808080",
        },
    }
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "#808080", "dash": "dot"},
    }
    return Panel(
        title=f"Against {against['model']}",
        columns=("domain", "difference", "95% low", "95% high", "rows"),
        rows=rows,
        figure=figure(
            [trace], x=f"difference in {against['metric']}", y="", height=120 + 26 * len(rows), shapes=[zero],
            yaxis={"autorange": "reversed", "automargin": True},
        ),
        note=against["sentence"],
    )  # fmt: skip
