"""What each band of diversity was worth when tuned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from honeloom.reporting.panel import GREY, INK, SERIES, SYMBOLS, Panel, figure
from honeloom.reporting.text import clip, plural
from honeloom.types.report import Report

__all__ = ["band_curve_panel"]

UNITS = {"loss": "minus nats per token", "accuracy": "share right"}
MEANING = {"inter": "closeness to other domains", "intra": "distance from its own middle"}

Point = dict[str, Any]


def band_curve_panel(folder: Path, report: Report) -> Panel | None:
    """Utility by band, one line per axis, against random rows; None where bands were not compared."""
    points = [p for p in report.details.get("band_curve") or () if p["value"] is not None]
    if not points:
        return None
    base = report.details.get("band_baseline")
    base = base if base and base["value"] is not None else None
    unit = UNITS.get(report.details.get("score", ""), "")
    bands = sorted({p["band"] for p in points}, key=_limits)
    axes = list(dict.fromkeys(p["axis"] for p in points))
    traces = [_line(i, axis, [p for p in points if p["axis"] == axis], bands) for i, axis in enumerate(axes)]
    traces += _chosen(points, bands)
    if base:
        traces.append(_baseline(base, len(bands)))
    return Panel(
        title="Value of each band",
        columns=("axis", "band", "value", "± stderr", "evaluations", "chosen"),
        rows=_table(points, base),
        figure=figure(
            traces, x="percentiles of the axis within a domain", y=f"value ({unit})" if unit else "value",
            shapes=_spread(base), hovermode="closest",
            xaxis={
                "tickmode": "array", "tickvals": list(range(len(bands))), "ticktext": bands, "zeroline": False,
                "range": [-0.5, len(bands) - 0.5],
            },
            yaxis={"zeroline": False},
        ),
        note=f"Value of a model tuned on rows of the band{f', in {unit}' if unit else ''}; higher is better, and bars "
        f"are one standard error. {_axes_told(axes)}{_against(points, base)}",
        alt=f"Line chart of the value of {plural(len(points), 'band')} by {' and '.join(map(clip, axes))}",
    )  # fmt: skip


def _limits(band: str) -> tuple[float, ...]:
    """A band's ends as numbers, to sort by; what is not a band comes last."""
    parts = band.split("-")
    return tuple(float(p) for p in parts) if all(p.replace(".", "", 1).isdigit() for p in parts) else (1e9,)


def _line(i: int, axis: str, points: list[Point], bands: list[str]) -> dict[str, Any]:
    points = sorted(points, key=lambda p: bands.index(p["band"]))
    colour = SERIES[i % len(SERIES)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": axis,
        "x": [bands.index(p["band"]) for p in points],
        "y": [p["value"] for p in points],
        "text": [f"{axis} {p['band']}" for p in points],
        "marker": {"size": 8, "color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)]},
        "line": {"color": colour, "width": 2},
        "error_y": {
            "type": "data", "array": [p.get("stderr") or 0.0 for p in points], "color": colour, "thickness": 1.2,
            "width": 3,
        },
        "hovertemplate": "%{text}: %{y:.4g}<extra></extra>",
    }  # fmt: skip


def _chosen(points: list[Point], bands: list[str]) -> list[dict[str, Any]]:
    """A ring round the band that was chosen."""
    taken = [p for p in points if p.get("chosen")]
    if not taken:
        return []
    ring = {"symbol": "circle-open", "size": 18, "color": INK, "line": {"color": INK, "width": 2}}
    at = {"x": [bands.index(p["band"]) for p in taken], "y": [p["value"] for p in taken]}
    return [{"type": "scatter", "mode": "markers", "name": "chosen", **at, "marker": ring, "hoverinfo": "skip"}]


def _baseline(base: Point, count: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "random rows",
        "x": [-0.5, count - 0.5],
        "y": [base["value"]] * 2,
        "line": {"color": GREY, "dash": "dash", "width": 2},
        "cliponaxis": True,
        "hovertemplate": "random rows: %{y:.4g}<extra></extra>",
    }


def _spread(base: Point | None) -> list[dict[str, Any]]:
    """One standard error either side of random rows."""
    if not base or not base.get("stderr"):
        return []
    ends = {"y0": base["value"] - base["stderr"], "y1": base["value"] + base["stderr"]}
    look = {"fillcolor": GREY, "opacity": 0.18, "line": {"width": 0}, "layer": "below"}
    return [{"type": "rect", "xref": "paper", "x0": 0, "x1": 1, **ends, **look}]


def _table(points: list[Point], base: Point | None) -> list[tuple[Any, ...]]:
    rows = [
        (p["axis"], p["band"], p["value"], p.get("stderr"), p.get("evaluations"), "chosen" if p.get("chosen") else "")
        for p in points
    ]
    if base:
        rows.append(("random rows", "", base["value"], base.get("stderr"), base.get("evaluations"), ""))
    return rows


def _axes_told(axes: list[str]) -> str:
    known = [f"{axis} is {MEANING[axis]}" for axis in axes if axis in MEANING]
    return f"Low percentiles are the least: {', '.join(known)}." if known else ""


def _against(points: list[Point], base: Point | None) -> str:
    """How far the chosen band is from random rows, and why that flatters it."""
    taken = next((p for p in points if p.get("chosen")), None)
    if taken is None:
        return ""
    called = f"{clip(taken['axis'])} {clip(taken['band'])}"
    flattered = f" It was picked among {len(points)} by these numbers, which flatters it." if len(points) > 1 else ""
    if base is None:
        return f" Chosen: {called}.{flattered}"
    gap = taken["value"] - base["value"]
    both = [e for e in (taken.get("stderr"), base.get("stderr")) if e is not None]
    error = sum(e * e for e in both) ** 0.5
    spent = " and ".join(str(p["evaluations"]) for p in (taken, base))
    noise = f" (standard error {error:.2g}, from {spent} evaluations)" if len(both) == 2 else ""
    side = "above" if gap > 0 else "below"
    return f" The chosen band, {called}, is {abs(gap):.2g} {side} random rows{noise}.{flattered}"
