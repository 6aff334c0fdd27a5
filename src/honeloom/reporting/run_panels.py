"""Panels about a whole run."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.reporting.panel import COLOURS, Panel, figure
from honeloom.types.report import Report

__all__ = ["headline_panel"]


def headline_panel(stages: Sequence[tuple[str, Report]]) -> Panel | None:
    """The evaluations of a run side by side: one column per evaluate stage, one row per domain."""
    evaluations = [(name, r) for name, r in stages if r.verb == "evaluate" and r.metrics]
    if not evaluations:
        return None
    metric = evaluations[0][1].metrics[0].name
    columns = {name: {m.domain or "all": m for m in r.metrics if m.name == metric} for name, r in evaluations}
    domains = list(dict.fromkeys(d for values in columns.values() for d in values))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [values[d].value for d in domains if d in values],
            "y": [d for d in domains if d in values],
            "marker": {"color": COLOURS[i % len(COLOURS)], "size": 9},
            "error_x": {
                "type": "data",
                "array": [values[d].stderr or 0.0 for d in domains if d in values],
                "color": COLOURS[i % len(COLOURS)],
                "thickness": 1,
            },
        }
        for i, (name, values) in enumerate(columns.items())
    ]
    unit = evaluations[0][1].metrics[0].unit
    return Panel(
        title=f"{metric} by domain",
        columns=("domain", *columns),
        rows=[(d, *(values[d].value if d in values else None for values in columns.values())) for d in domains],
        figure=figure(
            traces, x=f"{metric} ({unit})", y="", height=140 + 26 * len(domains),
            yaxis={"autorange": "reversed", "automargin": True},
        ),
        note="; ".join(r.details["against"]["sentence"] for _, r in evaluations if "against" in r.details),
    )  # fmt: skip
