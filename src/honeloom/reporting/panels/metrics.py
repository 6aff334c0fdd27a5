"""Metrics by domain, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import INK, Panel, by_name, figure, row_height
from honeloom.reporting.text import number
from honeloom.types.report import Metric, Report

__all__ = ["GROUPS", "metrics_panel", "metrics_table"]

GROUPS = 60
"""Names that a chart has room for; the table has more."""


def metrics_table(report: Report) -> Panel | None:
    """Every metric, without a chart."""
    if not report.metrics:
        return None
    rows = [(m.name, m.domain, m.value, m.stderr, m.n, m.unit) for m in _in_order(report.metrics)]
    return Panel("Metrics", ("metric", "domain", "value", "± stderr", "n", "unit"), rows)


def metrics_panel(folder: Path, report: Report) -> Panel | None:
    """Loss (or the first metric there is) by domain, with one standard error; the table has all metrics."""
    table = metrics_table(report)
    if table is None:
        return None
    name = next((m.name for m in report.metrics if m.name == "loss"), report.metrics[0].name)
    known = _domains_first([m for m in report.metrics if m.name == name and m.value is not None])
    shown = known[:GROUPS]
    rest = f" The chart has {len(shown)} of {len(known)} groups." if len(known) > len(shown) else ""
    return Panel(
        title=f"{name} by domain",
        columns=table.columns,
        rows=table.rows,
        figure=_chart(name, shown) if shown else None,
        note=f"{'Higher' if report.metrics[0].higher_is_better else 'Lower'} is better; "
        f"thin bars are one standard error.{rest}",
        alt=_alt(name, shown),
    )


def _chart(name: str, shown: list[Metric]) -> dict[str, Any]:
    names = [m.domain or "all" for m in shown]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [m.value for m in shown],
        "y": list(range(len(shown))),
        "text": names,
        "textposition": "none",
        "error_x": {"type": "data", "array": [m.stderr or 0.0 for m in shown], "color": INK, "thickness": 1.2},
        "hovertemplate": "%{text}: %{x:.4f}<extra></extra>",
    }
    return figure(
        [trace], x=f"{name} ({shown[0].unit})", y="", height=row_height(len(shown)),
        xaxis={"rangemode": "nonnegative"} if min(m.value for m in shown) >= 0 else {}, yaxis=by_name(names),
    )  # fmt: skip


def _domains_first(metrics: list[Metric]) -> list[Metric]:
    """Totals first, then the domains in their order."""
    totals = [m for m in metrics if m.domain in (None, "all", "macro")]
    return totals + [m for m in metrics if m not in totals]


def _in_order(metrics: Sequence[Metric]) -> list[Metric]:
    """Metric by metric, each with its totals first."""
    groups = {name: [m for m in metrics if m.name == name] for name in dict.fromkeys(m.name for m in metrics)}
    return [m for group in groups.values() for m in _domains_first(group)]


def _alt(name: str, shown: list[Metric]) -> str:
    if not shown:
        return ""
    low, high = min(shown, key=lambda m: m.value), max(shown, key=lambda m: m.value)
    return (
        f"Bar chart of {name} for {len(shown)} groups, from {number(low.value)} ({low.domain or 'all'}) "
        f"to {number(high.value)} ({high.domain or 'all'})"
    )
