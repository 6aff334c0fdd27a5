"""The paired comparison with another model."""

from __future__ import annotations

from pathlib import Path

from honeloom.reporting.panel import INK, Panel, by_name, figure, row_height, vertical_line
from honeloom.reporting.panels.metrics import GROUPS
from honeloom.reporting.records import read_inputs
from honeloom.reporting.text import name, number
from honeloom.types.report import Report

__all__ = ["comparison_panel"]


def comparison_panel(folder: Path, report: Report) -> Panel | None:
    """Difference per domain with its 95 % bootstrap interval; None without `--against`."""
    against = report.details.get("against")
    if not against:
        return None
    parts = {"all": {k: against[k] for k in ("difference", "ci95", "n")}, **against["domains"]}
    rows = [(d, p["difference"], p["ci95"][0], p["ci95"][1], p["n"]) for d, p in parts.items()]
    shown = [r for r in rows if None not in r][:GROUPS]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [r[1] for r in shown],
        "y": list(range(len(shown))),
        "text": [r[0] for r in shown],
        "marker": {"size": 9},
        "hovertemplate": "%{text}: %{x:.4f}<extra></extra>",
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [r[3] - r[1] for r in shown],
            "arrayminus": [r[1] - r[2] for r in shown],
            "color": INK,
            "thickness": 1.2,
        },
    }
    other = read_inputs(folder).get("against", against["model"])
    apart = sum(r[2] > 0 or r[3] < 0 for r in shown)
    return Panel(
        title=f"Against {other}",
        columns=("domain", "difference", "95% low", "95% high", "rows"),
        rows=rows,
        figure=figure(
            [trace], x=f"difference in {against['metric']}", y="", height=row_height(len(shown)),
            shapes=[vertical_line(0)], yaxis={**by_name([r[0] for r in shown]), "showgrid": True},
        ),
        note=f"Left of the dotted line this model is lower than {name(other)} on the same rows; "
        "bars are 95% bootstrap intervals.",
        alt=f"Dot chart of the difference in {against['metric']} for {len(shown)} groups; over all rows "
        f"{number(against['difference'])}; {apart} intervals lie off zero",
    )  # fmt: skip
