"""Panels about a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from honeloom.reporting.panel import GREY, SERIES, SYMBOLS, Panel, by_name, figure, row_height
from honeloom.reporting.panels.metrics import GROUPS
from honeloom.reporting.text import number
from honeloom.types.report import Metric, Report

__all__ = ["headline_panel"]

Column = dict[str, Metric]


def headline_panel(stages: Sequence[tuple[str, Report]]) -> Panel | None:
    """The evaluations of a run side by side: one column per evaluate stage, one row per domain."""
    evaluations = [(name, r) for name, r in stages if r.verb == "evaluate" and r.metrics]
    if not evaluations:
        return None
    main = evaluations[0][1].metrics[0]
    columns: dict[str, Column] = {
        name: {m.domain or "all": m for m in r.metrics if m.name == main.name and m.value is not None}
        for name, r in evaluations
    }
    domains = _totals_first(dict.fromkeys(d for values in columns.values() for d in values))
    shown = domains[:GROUPS]
    traces = [_links(list(columns.values()), shown)] if len(columns) > 1 else []
    traces += [_dots(i, name, values, shown) for i, (name, values) in enumerate(columns.items())]
    unit = main.unit
    rest = f" The chart has {len(shown)} of {len(domains):,} domains." if len(domains) > len(shown) else ""
    return Panel(
        title=f"{main.name} by domain",
        columns=("domain", *(c for name in columns for c in (name, "± stderr"))),
        rows=[(d, *(v for values in columns.values() for v in _cells(values.get(d)))) for d in domains],
        figure=figure(
            traces, x=f"{main.name} ({unit})", y="", height=row_height(len(shown)), xaxis=_from_zero(columns),
            yaxis={**by_name(shown), "showgrid": True},
        ),
        note=f"{'Higher' if main.higher_is_better else 'Lower'} is better; bars are one standard error.{rest}",
        alt=_alt(main.name, columns),
    )  # fmt: skip


def _from_zero(columns: dict[str, Column]) -> dict[str, Any]:
    lowest = min((m.value for values in columns.values() for m in values.values()), default=0.0)
    return {"rangemode": "nonnegative"} if lowest >= 0 else {}


def _totals_first(domains: dict[str, None]) -> list[str]:
    totals = [d for d in domains if d in ("all", "macro")]
    return totals + [d for d in domains if d not in totals]


def _cells(metric: Metric | None) -> tuple[float | None, float | None]:
    return (metric.value, metric.stderr) if metric else (None, None)


def _dots(i: int, name: str, values: Column, domains: list[str]) -> dict[str, Any]:
    here = [(row, values[d]) for row, d in enumerate(domains) if d in values]
    colour = SERIES[i % len(SERIES)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [m.value for _, m in here],
        "y": [row for row, _ in here],
        "text": [m.domain or "all" for _, m in here],
        "marker": {"color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 10},
        "error_x": {"type": "data", "array": [m.stderr or 0.0 for _, m in here], "color": colour, "thickness": 1.2},
        "hovertemplate": "%{text}: %{x:.4f}<extra></extra>",
    }


def _links(columns: list[Column], domains: list[str]) -> dict[str, Any]:
    """A thin line per domain from its lowest to its highest value."""
    x: list[float | None] = []
    y: list[int | None] = []
    for row, d in enumerate(domains):
        values = [c[d].value for c in columns if d in c]
        x += [min(values), max(values), None]
        y += [row, row, None]
    line = {"color": GREY, "width": 1.5}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "hoverinfo": "skip", "showlegend": False}


def _alt(name: str, columns: dict[str, Column]) -> str:
    means = [f"{stage} {number(values['all'].value)}" for stage, values in columns.items() if "all" in values]
    over = f"; over all rows: {', '.join(means)}" if means else ""
    return f"Dot chart of {name} by domain for {', '.join(columns)}{over}"
