"""What is left of v when the best, or the worst, clusters are taken away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import SERIES, Panel, figure
from honeloom.reporting.text import number
from honeloom.reporting.valuation import told_v, unit_of
from honeloom.types.report import Report

__all__ = ["removal_panel"]

Z = 1.96


def removal_panel(folder: Path, report: Report) -> Panel | None:
    """V by the share of clusters taken away, best first and worst first; None where no curves were evaluated."""
    removal = report.details.get("removal")
    if not removal:
        return None
    share, best, worst = removal["share"], removal["without_best"], removal["without_worst"]
    sd = (report.details.get("noise") or {}).get("sd")
    inner = [(w - b) for b, w in zip(best[1:-1], worst[1:-1], strict=True) if b is not None and w is not None]
    gap = sum(inner) / len(inner) if inner else None
    told = ""
    if gap is not None:
        told = f" Here v without the worst is on average {number(gap)} above v without the best."
        if gap <= 0:
            told = (
                f" Here v without the worst is on average {number(-gap)} BELOW v without the best: mistrust the order."
            )
    unit = unit_of(report)
    traces = [
        _line(0, "without the best", share, best, sd),
        _line(1, "without the worst", share, worst, sd),
    ]
    bars = " Bars are the 95% range of a single evaluation's noise." if sd else ""
    return Panel(
        title="Taking clusters away",
        columns=("share taken away", "v without the best", "v without the worst"),
        rows=[(f"{s:.0%}", b, w) for s, b, w in zip(share, best, worst, strict=True)],
        figure=figure(
            traces, x="share of the clusters taken away", y=f"v{f' ({unit})' if unit else ''}",
            xaxis={"tickformat": ".0%", "zeroline": False}, yaxis={"zeroline": False},
        ),
        note=f"v is {told_v(report)}. If the ranking is good, the line without the best falls fast, and the line "
        f"without the worst stays up or rises; lines that run together mean that it says little.{told}{bars}",
        alt=f"Line chart of v from {number(best[0])} with all clusters to {number(best[-1])} with none, taking away "
        f"the best or the worst first{f'; the mean gap between the lines is {number(gap)}' if gap is not None else ''}",
    )  # fmt: skip


def _line(
    i: int, name: str, share: Sequence[float], values: Sequence[float | None], sd: float | None
) -> dict[str, Any]:
    """A curve; its ends are means of repeats, and what lies between is one evaluation each."""
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(share),
        "y": list(values),
        "marker": {"size": 9},
        "line": {"color": SERIES[i], "width": 2},
        "hovertemplate": f"{name}, %{{x:.0%}} taken away: %{{y:.4g}}<extra></extra>",
    }
    if sd:
        half = [0.0, *[Z * sd] * (len(values) - 2), 0.0]
        trace["error_y"] = {"type": "data", "array": half, "color": SERIES[i], "thickness": 1, "width": 3}
    return trace
