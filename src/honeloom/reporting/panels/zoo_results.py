"""Panels of `glue`: the advice, members and results with intervals, the search's trace, and the coefficients found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import GREY, INK, SERIES, Panel, by_name, figure, row_height, vertical_line
from honeloom.reporting.text import clip, name, number, plural
from honeloom.types.report import Report

__all__ = ["advice_panel", "coefficients_panel", "results_panel", "search_panel"]

_SHOWN = 30
_TRACE = 2000
_KINDS = ("member", "merge", "mixture")


def advice_panel(folder: Path, report: Report) -> Panel | None:
    """What to do, in words."""
    advice = report.details.get("advice")
    if not advice:
        return None
    return Panel(
        title="Advice",
        columns=("what was found",),
        rows=[(line,) for line in advice],
        note="Every sentence rests on the rows of the report, which chose nothing.",
    )


def results_panel(folder: Path, report: Report) -> Panel | None:
    """Value on the report rows of every member, merge and mixture, with its difference to the best single model."""
    models: Sequence[Mapping[str, Any]] = report.details.get("models") or ()
    if not models:
        return None
    unit, best = report.details["unit"], report.details["best_single_name"]
    ordered = sorted(models, key=lambda m: (m["value"] is None, m["value"]))
    domains = list(dict.fromkeys(d for m in ordered for d in m["domains"]))
    shown = [m for m in ordered if m["value"] is not None][:_SHOWN]
    traces = [
        _dots([(i, m) for i, m in enumerate(shown) if m["kind"] == kind], kind) for kind in _KINDS
        if any(m["kind"] == kind for m in shown)
    ]  # fmt: skip
    line = next(m["value"] for m in models if m["name"] == best)
    chart = figure(
        traces, x=unit, y="", height=row_height(len(shown)), shapes=[vertical_line(line)],
        yaxis={**by_name([m["name"] for m in shown]), "showgrid": True},
    )  # fmt: skip
    rows = [
        (
            m["name"],
            m["kind"],
            m["value"],
            *(m["interval"] or (None, None, None)),
            *(m["domains"].get(d) for d in domains),
        )
        for m in ordered
    ]
    return Panel(
        title="Members and results",
        columns=(
            "model",
            "what it is",
            unit,
            "less the best single",
            "95% low",
            "95% high",
            *(d or "all" for d in domains),
        ),
        rows=rows,
        figure=chart,
        note=f"Mean over domains on the report rows; lower is better. The dotted line is the best single model, "
        f"{name(best)}; bars are 95% intervals of the paired difference to it, drawn around each value.",
        alt=f"Dot chart of {plural(len(shown), 'model')}; the result {report.details['result_name']} has "
        f"{number(report.details['result'])} {unit}, the best single model {number(line)}",
    )


def _dots(models: Sequence[tuple[int, Mapping[str, Any]]], kind: str) -> dict[str, Any]:
    """One kind of model as dots; the interval of its difference as a bar."""
    spans = [m["interval"] or (0.0, 0.0, 0.0) for _, m in models]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "x": [m["value"] for _, m in models],
        "y": [i for i, _ in models],
        "text": [m["name"] for _, m in models],
        "marker": {"size": 9},
        "hovertemplate": "%{text}: %{x:.4f}<extra></extra>",
        "error_x": {
            "type": "data", "symmetric": False, "color": INK, "thickness": 1.2,
            "array": [s[2] - s[0] for s in spans], "arrayminus": [s[0] - s[1] for s in spans],
        },
    }  # fmt: skip


def search_panel(folder: Path, report: Report) -> Panel | None:
    """What every candidate of the searches was worth, and the best so far; None where nothing was searched."""
    searches: Mapping[str, Mapping[str, Any]] = report.details.get("search") or {}
    points = [
        (cluster, found["models"], number, step)
        for cluster, found in searches.items()
        for number, step in enumerate(found["trace"], 1)
    ]
    if not points:
        return None
    traces = [_trace(cluster, found["models"], found["trace"][:_TRACE]) for cluster, found in searches.items()]
    return Panel(
        title="Search",
        columns=("cluster", "evaluation", "value", "rows read", "less the best so far", "verdict", "weights"),
        rows=[
            (c, n, s["value"], s["rows"], s["difference"], "taken" if s["accepted"] else "", _weights(models, s))
            for c, models, n, s in points
        ],
        figure=figure([t for pair in traces for t in pair], x="evaluation", y=report.details["unit"]),
        note="Each point is a merge that was measured on search rows; one that was clearly worse was stopped before it "
        "had read all of them. The line is the best accepted so far.",
        alt=f"Scatter chart of {plural(len(points), 'evaluation')} in {plural(len(searches), 'cluster')}",
        file="search.jsonl",
    )


def _weights(models: Sequence[str], step: Mapping[str, Any]) -> str:
    """Weights of a candidate in words, means over groups of layers, those that are 0 left out."""
    means = [sum(group[i] for group in step["weights"]) / len(step["weights"]) for i in range(len(models))]
    return ", ".join(f"{clip(model, 24)} {number(mean)}" for model, mean in zip(models, means, strict=True) if mean)


def _trace(cluster: str, models: Sequence[str], steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every candidate as a point, and the value of the best so far."""
    x, best, line = list(range(1, len(steps) + 1)), None, []
    for step in steps:
        best = step["value"] if step["accepted"] else best
        line.append(best)
    points = {
        "type": "scatter", "mode": "markers", "name": cluster, "x": x, "y": [s["value"] for s in steps],
        "text": [_weights(models, s) for s in steps], "marker": {"size": 6},
        "hovertemplate": "%{text}: %{y:.4f}<extra></extra>",
    }  # fmt: skip
    accepted = {
        "type": "scatter", "mode": "lines", "name": f"{cluster}, best so far", "x": x, "y": line,
        "line": {"color": GREY, "shape": "hv"}, "hovertemplate": "%{y:.4f}<extra></extra>",
    }  # fmt: skip
    return [points, accepted]


def coefficients_panel(folder: Path, report: Report) -> Panel | None:
    """Weight of every model in every group of layers."""
    searches: Mapping[str, Mapping[str, Any]] = report.details.get("search") or {}
    rows, lines, cells = [], [], []
    most = max((len(s["weights"]) for s in searches.values()), default=0)
    groups = ["all"] if most == 1 else [*(f"layers {i}" for i in range(1, most)), "the rest"]
    for cluster, found in searches.items():
        for place, model in enumerate(found["models"]):
            weights = [group[place] for group in found["weights"]]
            rows.append((cluster, model, *weights, *[None] * (len(groups) - len(weights))))
            lines.append(f"{model} ({cluster})")
            cells.append([*weights, *[None] * (len(groups) - len(weights))])
    if not rows:
        return None
    trace = {
        "type": "heatmap", "x": list(range(len(groups))), "y": list(range(len(lines[:_SHOWN]))), "z": cells[:_SHOWN],
        "colorscale": [[0, "--raised"], [1, SERIES[0]]], "xgap": 1, "ygap": 1, "opacity": 0.6, "showscale": False,
        "texttemplate": "%{z:.2f}", "textfont": {"color": "--ink"}, "hovertemplate": "%{z:.4f}<extra></extra>",
    }  # fmt: skip
    return Panel(
        title="Coefficients",
        columns=("cluster", "model", *groups),
        rows=rows,
        figure=figure(
            [trace], x="group of layers", y="", height=row_height(len(lines[:_SHOWN])) + 40,
            yaxis=by_name(lines[:_SHOWN]), xaxis={**by_name(groups), "range": [-0.5, len(groups) - 0.5]},
        ),
        note="Weights of the merge that was taken; 0 leaves a model out.",
        alt=f"Heat map of the weights of {plural(len(lines), 'model')} in {plural(len(groups), 'group')} of layers",
    )  # fmt: skip
