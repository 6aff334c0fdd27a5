"""Map of the rows, coloured by value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from honeloom.reporting.panel import GREY, INK, SERIES, Panel, figure
from honeloom.reporting.text import clip, number
from honeloom.reporting.valuation import read_columns
from honeloom.types.report import Report

__all__ = ["ENDS", "ID", "bare_axis", "colours", "even_sample", "row_map_panel", "short_places", "value_traces"]

MOST = 3_000
"""Points drawn: each is an element of the page's picture."""
ENDS = 0.95
ID = 32
SCALE = ((0.0, SERIES[1]), (0.5, GREY), (1.0, SERIES[0]))

Floats = npt.NDArray[np.float64]


def row_map_panel(folder: Path, report: Report) -> Panel | None:
    """Rows by the position of their vectors, coloured by the value of their cluster.

    None without positions or clusters, and where a value is a row's own: those have a map by domain.
    """
    needed = ("id", "score", "cluster", "selected", "x", "y")
    table = read_columns(folder / "scores.parquet", needed, ("pseudo_domain",))
    if table is None or "pseudo_domain" in table.column_names or table["score"].null_count == len(table):
        return None
    table = table.filter(pc.and_(table["x"].is_valid(), table["y"].is_valid()))
    picked = even_sample(table["cluster"].to_numpy().astype(float), report.seed)
    drawn = table.take(picked)
    scores = table["score"].to_numpy().astype(float)
    low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
    middle = 0.0 if low < 0 < high else (low + high) / 2
    # A few extreme clusters would leave the others all grey.
    far = np.abs(scores[np.isfinite(scores)] - middle)
    reach = float(np.quantile(far, ENDS)) or float(far.max()) or 1.0
    beyond = " The outermost 5% have the colour of the scale's ends." if far.max() > reach else ""
    sampled = ""
    if len(drawn) < len(table):
        sampled = f" Drawn are {len(drawn):,} of {len(table):,} rows, an even sample of every cluster."
    return Panel(
        title="Map of the rows",
        columns=("cluster", "value", "rows", "kept", "middle x", "middle y"),
        rows=_by_cluster(table),
        figure=figure(
            value_traces(drawn, "score", "value"), x="", y="", height=480,
            coloraxis=colours("value", SCALE, middle - reach, middle + reach),
            xaxis=bare_axis(), yaxis=bare_axis(), hovermode="closest",
        ),
        note="Rows near each other have alike vectors, seen in the plane of their largest variance. A row's colour is "
        f"the value of its cluster: blue high, orange low, grey {'zero' if middle == 0.0 else 'midway'}.{beyond} "
        f"Outlined diamonds were kept.{sampled}",
        alt=f"Scatter chart of {len(drawn):,} rows coloured by value from {number(low)} to {number(high)}; "
        f"{int(np.count_nonzero(drawn['selected'].to_numpy())):,} of them were kept",
        file="scores.parquet",
    )  # fmt: skip


def even_sample(cluster: Floats, seed: int) -> npt.NDArray[np.int64]:
    """Every k-th row of the rows sorted by cluster, from a start drawn by the seed; ascending."""
    order = np.argsort(cluster, kind="stable")
    if len(order) <= MOST:
        return np.sort(order)
    start = np.random.default_rng(seed).random()
    return np.sort(order[((np.arange(MOST) + start) * len(order) / MOST).astype(np.int64)])


def value_traces(
    drawn: pa.Table, column: str, called: str, texts: Sequence[str] | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows without a value, rows left out, and kept ones on top, coloured by a column.

    Parameters
    ----------
    drawn : table
        With id, selected, x, y and the column; with cluster unless `texts` are given.
    column, called : str
        What the colour says, and its name in a hover text.
    texts : sequence of str, optional
        Hover text of every row; default: id and cluster.
    """
    score, kept = drawn[column].to_numpy().astype(float), drawn["selected"].to_numpy()
    known = np.isfinite(score)
    shared = {"x": short_places(drawn["x"]), "y": short_places(drawn["y"])}
    looks: list[tuple[str, npt.NDArray[np.bool_], dict[str, Any]]] = [
        (f"without {'an' if called[0] in 'aeiou' else 'a'} {called}", ~known, {"symbol": "x", "size": 5}),
        ("left out", known & ~kept, {"symbol": "circle", "size": 5, "opacity": 0.8}),
        ("kept", known & kept, {"symbol": "diamond", "size": 9, "line": {"color": INK, "width": 1.2}}),
    ]
    traces = []
    for name, which, marker in looks:
        at = np.flatnonzero(which)
        if not len(at):
            continue
        value = ""
        shade: dict[str, Any] = {"color": GREY}
        if known[at[0]]:
            shade = {"color": [float(f"{v:.4g}") for v in score[at]], "coloraxis": "coloraxis"}
            value = f"<br>{called} %{{marker.color:.4g}}"
        points = {
            **{axis: [values[i] for i in at] for axis, values in shared.items()},
            **_hover(drawn, at, texts, value, name),
            "marker": {**marker, **shade},
        }
        # The legend cannot show a colour that is a number: a trace of no point stands there in grey.
        example = {"name": name, "x": [None], "y": [None], "marker": {**marker, "color": GREY}}
        common = {"type": "scatter", "mode": "markers", "legendgroup": name}
        traces += [{**common, "showlegend": False, **points}, {**common, **example}]
    return traces


def _hover(
    drawn: pa.Table, at: npt.NDArray[np.int64], texts: Sequence[str] | None, value: str, name: str
) -> dict[str, Any]:
    if texts is not None:
        return {"text": [texts[i] for i in at], "hovertemplate": f"%{{text}}{value}<extra>{name}</extra>"}
    return {
        "text": [clip(row, ID) for row in drawn["id"].take(at).to_pylist()],
        "customdata": drawn["cluster"].take(at).to_pylist(),
        "hovertemplate": f"%{{text}}<br>cluster %{{customdata}}{value}<extra>{name}</extra>",
    }


def short_places(column: pa.ChunkedArray) -> list[float]:
    """Coordinates to a thousandth of their range: finer than a pixel, and few characters."""
    values = column.to_numpy().astype(float)
    span = float(np.ptp(values)) or 1.0
    return [float(v) for v in np.round(values, max(0, 3 - math.floor(math.log10(span))))]


def _by_cluster(table: pa.Table) -> list[tuple[Any, ...]]:
    """The map in numbers: every cluster's rows and middle, the best first."""
    wanted = [("score", "max"), ("selected", "sum"), ("x", "mean"), ("y", "mean"), ([], "count_all")]
    table = table.set_column(table.column_names.index("selected"), "selected", table["selected"].cast(pa.int64()))
    groups = table.group_by("cluster", use_threads=False).aggregate(wanted).to_pylist()
    groups.sort(key=lambda g: (g["score_max"] is None, -(g["score_max"] or 0.0), g["cluster"] or 0))
    return [
        ("(none)" if g["cluster"] is None else str(g["cluster"]), g["score_max"], g["count_all"], g["selected_sum"],
         g["x_mean"], g["y_mean"])
        for g in groups
    ]  # fmt: skip


def colours(called: str, scale: Sequence[tuple[float, str]], low: float, high: float) -> dict[str, Any]:
    """A colour axis between two values, with its bar."""
    return {
        "colorscale": [list(stop) for stop in scale],
        "cmin": low,
        "cmax": high,
        "colorbar": {
            "title": {"text": called, "font": {"size": 13}},
            "thickness": 12,
            "len": 0.9,
            "outlinewidth": 0,
            "tickformat": ".2~g",
        },
    }


def bare_axis() -> dict[str, Any]:
    """An axis without numbers: only nearness means something."""
    return {"showticklabels": False, "zeroline": False, "title": {"text": ""}}
