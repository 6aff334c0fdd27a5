"""What dropping costs in loss: along the order of drops, and against what the model then costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import SERIES, SYMBOLS, Panel, figure
from honeloom.reporting.text import number, plural
from honeloom.types.report import Report

__all__ = ["drop_order_panel", "pareto_panel"]

Point = Mapping[str, Any]
_COSTS = (
    ("params", "parameters"),
    ("kv_bytes_per_token", "cache bytes per token"),
    ("flops_per_token", "matrix FLOPs per token"),
    ("tokens_per_second", "decoded tokens per second"),
)


def drop_order_panel(folder: Path, report: Report) -> Panel | None:
    """The order of drops, and the measured rise of the loss after each of them."""
    points: Sequence[Point] = report.details.get("curve", ())
    order: Sequence[str] = report.details.get("order", ())
    if not order:
        return None
    by_count = {point["dropped"]: point for point in points}
    rows = [(i + 1, unit, *_losses(by_count.get(i + 1))) for i, unit in enumerate(order)]
    measured = [point for point in points if point["rise"] is not None]
    return Panel(
        title="Order of drops",
        columns=("step", "dropped", "loss (nats/token)", "rise", "± stderr"),
        rows=rows,
        figure=_order_chart(measured) if measured else None,
        note=_basis(report, measured),
        alt=f"Rise of the loss after each of {plural(len(order), 'drop')}, in the order {', '.join(order)}",
    )


def _losses(point: Point | None) -> tuple[float | None, float | None, float | None]:
    return (point["loss"], point["rise"], point["rise_stderr"]) if point else (None, None, None)


def _basis(report: Report, measured: Sequence[Point]) -> str:
    if not measured:
        return "No loss was measured: there were no calibration rows with scored tokens, or measure was 0."
    rows = next((m.n for m in report.metrics if m.name == "loss"), 0)
    healed = report.details.get("healing")
    return (
        f"Measured on {plural(rows, 'calibration row')}, which also decided the order; evaluate the result on other "
        "rows. Bars are one standard error of the paired difference from the source."
        + (" Before healing." if healed else "")
    )


def _order_chart(points: Sequence[Point]) -> dict[str, Any]:
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "",
        "x": [p["dropped"] for p in points],
        "y": [p["rise"] for p in points],
        "error_y": {"type": "data", "array": [p["rise_stderr"] or 0.0 for p in points], "thickness": 1},
        "text": [p["unit"] or "nothing" for p in points],
        "hovertemplate": "%{text}: %{y:.4g} nats per token<extra></extra>",
    }
    return figure([trace], x="dropped units", y="rise of the loss (nats/token)", xaxis={"tickformat": "d"})


def pareto_panel(folder: Path, report: Report) -> Panel | None:
    """Loss against parameters, cache and FLOPs as shares of the source, and measured speed; the result is a star."""
    points = [p for p in report.details.get("curve", ()) if p["loss"] is not None]
    if len(points) < 2:
        return None
    shown = [(key, name) for key, name in _COSTS if points[0][key]]
    healed = _healed(report)
    rows = [
        (p["dropped"], p["unit"] or "nothing", p["loss"], *(p[key] for key, _ in shown), _decision(p, points))
        for p in points
    ]
    if healed is not None:
        rows.append((points[-1]["dropped"], "healed", healed, *(points[-1][key] for key, _ in shown), "chosen"))
    zero = " Profile zero saves none of it; costs are those of a profile that does." * (
        report.details.get("profile") == "zero"
    )
    return Panel(
        title="Loss against cost",
        columns=("dropped", "last", "loss (nats/token)", *(name for _, name in shown), "decision"),
        rows=rows,
        figure=_pareto_chart(points, shown, healed),
        note=f"Each line is one kind of cost, in percent of the source; the star is what was written.{zero}",
        alt=f"Loss against {', '.join(name for _, name in shown)} for {len(points)} plans; the chosen one has a loss "
        f"of {number(points[-1]['loss'] if healed is None else healed)}",
    )


def _healed(report: Report) -> float | None:
    return next((m.value for m in report.metrics if m.name == "loss" and m.domain == "healed"), None)


def _decision(point: Point, points: Sequence[Point]) -> str:
    if point["dropped"] == 0:
        return "source"
    return "chosen" if point is points[-1] else "on the way"


def _pareto_chart(points: Sequence[Point], shown: Sequence[tuple[str, str]], healed: float | None) -> dict[str, Any]:
    traces = []
    for i, (key, name) in enumerate(shown):
        shares = [100 * p[key] / points[0][key] for p in points]
        losses = [p["loss"] for p in points]
        marks = [SYMBOLS[i]] * (len(points) - 1) + ["star"]
        sizes = [7] * (len(points) - 1) + [15]
        if healed is not None:
            shares, losses = [*shares, shares[-1]], [*losses, healed]
            marks, sizes = [*[SYMBOLS[i]] * len(points), "star"], [*[7] * len(points), 15]
        traces.append({
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": shares,
            "y": losses,
            "marker": {"symbol": marks, "size": sizes},
            "line": {"width": 1.2, "color": SERIES[i]},
            "hovertemplate": "%{x:.1f}%: %{y:.4g} nats per token<extra></extra>",
        })  # fmt: skip
    return figure(traces, x="percent of the source", y="loss (nats/token)", height=380)
