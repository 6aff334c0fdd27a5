"""Panels about a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from honeloom.reporting.panel import GREY, SERIES, SYMBOLS, Panel, by_name, figure, row_height, vertical_line
from honeloom.reporting.panels.metrics import GROUPS
from honeloom.reporting.text import number
from honeloom.types.report import Metric, Report

__all__ = ["ablation_panel", "headline_panel", "sweep_panel"]

Column = dict[str, Metric]


def headline_panel(stages: Sequence[tuple[str, Report]], run: Report) -> Panel | None:
    """The evaluations of a run side by side: one column per evaluate stage, one row per domain.

    Of a sweep, those that all points share and those of points that nothing beats, as far as there are colours; of an
    ablation those of the whole recipe.
    """
    replaced = {s["name"] for s in run.details.get("stages", ()) if s.get("without")}
    evaluations = [(name, r) for name, r in stages if r.verb == "evaluate" and r.metrics and name not in replaced]
    if sweep := run.details.get("sweep") if run.verb == "run" else None:
        best = {s for p in sweep["points"] if p["pareto"] for s in p["stages"].values()}
        evaluations = [(name, r) for name, r in evaluations if name in best][: len(SERIES)]
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


def sweep_panel(report: Report) -> Panel | None:
    """The points of a sweep: values, objectives, and those that no other point beats; two objectives as a chart."""
    sweep = report.details.get("sweep") if report.verb == "run" else None  # select has one of depths
    if not sweep:
        return None
    points, objectives = sweep["points"], sweep["objectives"]
    names = [o["name"] for o in objectives]
    rows = [
        (
            p["point"], *(_value(p["values"][key]) for key in sweep["keys"]),
            *(c for n in names for c in _numbers(p["objectives"][n])), "✓" if p["pareto"] else "",
        )
        for p in points
    ]  # fmt: skip
    told = [f"{o['name']} ({o['unit']}, {o['better']} is better)".replace("(, ", "(") for o in objectives]
    unbeaten = [p["point"] for p in points if p["pareto"]]
    return Panel(
        title="Points of the sweep",
        columns=("point", *sweep["keys"], *(c for t in told for c in (t, "± stderr")), "unbeaten"),
        rows=rows,
        figure=_front(points, objectives) if len(objectives) > 1 else None,
        note=f"Unbeaten: {_listed(unbeaten)}. A point is when no other is at least as good in every objective and "
        "better in one.",
        alt=f"{names[0]} against {names[1]} of {len(points)} points; unbeaten: {_listed(unbeaten)}"
        if len(names) > 1 else "",
        file="sweep.json",
    )  # fmt: skip


def ablation_panel(report: Report) -> Panel | None:
    """What every replacement of a stage changed, with its interval; None without an ablation."""
    effects = report.details.get("ablation") if report.verb == "run" else None
    if not effects:
        return None
    rows = []
    for e in effects:
        macro = e["macro"] or {"difference": None, "ci95": (None, None)}
        rows.append((e["without"], e["instead"], e["value"], e["difference"], *e["ci95"], macro["difference"],
                     *macro["ci95"]))  # fmt: skip
    first = effects[0]
    same = all((e["metric"], e["unit"]) == (first["metric"], first["unit"]) for e in effects)
    worse = "above" if first["better"] == "lower" else "below"
    return Panel(
        title="Without each stage",
        columns=(
            "without",
            "instead",
            "value",
            "less the whole",
            "low",
            "high",
            "macro, less the whole",
            "low",
            "high",
        ),
        rows=rows,
        figure=_effects(effects) if same else None,
        note=f"{first['metric']} ({first['unit']}) less that of the whole recipe, {first['whole']:.4f}, on the same "
        f"rows, with 95% intervals; {worse} 0 the stage has helped. Macro: the mean over domains.",
        alt=f"Differences in {first['metric']} of {len(effects)} recipes with a stage replaced, with 95% intervals",
        file="ablation.json",
    )


def _effects(effects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [f"{e['without']}: {e['instead']}" for e in effects]
    bars = {
        "type": "data", "symmetric": False, "array": [e["ci95"][1] - e["difference"] for e in effects],
        "arrayminus": [e["difference"] - e["ci95"][0] for e in effects], "color": SERIES[0], "thickness": 1.2,
    }  # fmt: skip
    trace = {
        "type": "scatter", "mode": "markers", "x": [e["difference"] for e in effects], "y": list(range(len(effects))),
        "error_x": bars, "marker": {"color": SERIES[0], "symbol": SYMBOLS[0], "size": 10},
        "hovertemplate": "%{x:+.4f}<extra></extra>",
    }  # fmt: skip
    return figure(
        [trace], x=f"{effects[0]['metric']} less the whole ({effects[0]['unit']})", y="",
        height=row_height(len(effects)), yaxis={**by_name(names), "showgrid": True}, shapes=[vertical_line(0.0)],
    )  # fmt: skip


def _listed(points: Sequence[int]) -> str:
    named = f"point{'s' * (len(points) > 1)} {', '.join(map(str, points))}"
    return named if points else "no point"


def _value(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)


def _numbers(found: dict[str, Any]) -> tuple[Any, Any]:
    return found["value"], found["stderr"]


def _front(points: Sequence[dict[str, Any]], objectives: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The first two objectives of every point."""
    x, y = objectives[:2]
    traces = []
    for label, wanted in (("unbeaten", True), ("beaten", False)):
        known = [p for p in points if all(p["objectives"][o["name"]]["value"] is not None for o in (x, y))]
        here = [p for p in known if p["pareto"] is wanted]
        if here:
            traces.append({
                "type": "scatter", "mode": "markers+text" if len(points) <= 24 else "markers", "name": label,
                "x": [p["objectives"][x["name"]]["value"] for p in here],
                "y": [p["objectives"][y["name"]]["value"] for p in here],
                "text": [str(p["point"]) for p in here], "textposition": "top center",
                "marker": {
                    "color": SERIES[0] if wanted else GREY, "symbol": SYMBOLS[0 if wanted else 1],
                    "size": 12 if wanted else 8,
                },
                "hovertemplate": "point %{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
            })  # fmt: skip
    return figure(traces, x=x["name"], y=y["name"], height=360)
