"""What a panel is: a title, an optional chart, and the table that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from honeloom.reporting.text import NAME, clip, visible

__all__ = [
    "GREY",
    "INK",
    "ROWS_SHOWN",
    "SERIES",
    "SYMBOLS",
    "Panel",
    "by_name",
    "figure",
    "row_height",
    "share_map",
    "vertical_line",
]

SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
"""Colours of series, by name: the style sheet gives each a value for light, dark and paper (after Okabe and Ito)."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
GREY, INK, GRID = "--chart-grey", "--chart-ink", "--chart-grid"
ROWS_SHOWN = 300
"""Rows of a table on the page; where there are more, the table says how many and which file has them."""
UNDER = 20
"""Characters of a name below a column."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One block of the page.

    `figure` is a plotly figure as plain JSON data (SVG traces only, at most 5,000 points), its
    colours named, its texts raw: the page's script fills in and escapes both. `columns` and
    `rows` are its table twin, `alt` says in a sentence what the chart shows, `file` has the
    rows that a long table leaves out.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figure: dict[str, Any] | None = None
    note: str = ""
    alt: str = ""
    file: str = "report.json"

    @property
    def shown(self) -> Sequence[Sequence[Any]]:
        """The rows that the page has."""
        return self.rows[:ROWS_SHOWN]

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether it holds numbers and nothing else."""
        return [_is_numeric([row[i] for row in self.shown]) for i in range(len(self.columns))]


def _is_numeric(cells: Sequence[Any]) -> bool:
    known = [c for c in cells if c is not None]
    return bool(known) and all(isinstance(c, int | float) and not isinstance(c, bool) for c in known)


def figure(traces: list[dict[str, Any]], *, x: str, y: str, height: int = 340, **layout: Any) -> dict[str, Any]:
    """A plotly figure with the page's axes; `layout` adds to it, and `xaxis` and `yaxis` in it to the axes."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True, "fixedrange": True}
    axes = {
        "xaxis": {**axis, "title": {"text": x, "standoff": 12, "font": {"size": 13}}, **layout.pop("xaxis", {})},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8, "font": {"size": 13}}, **layout.pop("yaxis", {})},
    }
    return {
        "data": [_styled(t, i) for i, t in enumerate(traces)],
        "layout": {
            "height": height,
            "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
            "showlegend": sum(bool(t.get("name")) for t in traces) > 1,
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
            "font": {"size": 13, "color": INK},
            "bargap": 0.25,
            **axes,
            **layout,
        },
    }


def _styled(trace: dict[str, Any], i: int) -> dict[str, Any]:
    """Every series has its colour and its symbol: neither has to be told apart alone. Names are clipped."""
    if "text" in trace:
        trace = {**trace, "text": _clipped(trace["text"])}
    if "name" in trace:
        trace = {**trace, "name": clip(trace["name"], NAME)}
    if trace["type"] == "heatmap":
        return trace
    marker = {"color": SERIES[i % len(SERIES)], "symbol": SYMBOLS[i % len(SYMBOLS)], **trace.get("marker", {})}
    if trace["type"] == "bar":
        marker.pop("symbol")
        return {**trace, "marker": marker}
    return {"cliponaxis": False, **trace, "marker": marker}


def _clipped(texts: Sequence[Any]) -> list[Any]:
    """Texts of points, or rows of texts of cells, each at most as long as a name."""
    return [_clipped(t) if isinstance(t, list) else clip(t, NAME) for t in texts]


def by_name(names: Sequence[str]) -> dict[str, Any]:
    """A vertical axis of names, the first on top.

    Rows are placed by number: names that look like numbers or dates, or begin alike, stay apart.
    """
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [clip(n, NAME) for n in names],
        "range": [len(names) - 0.4, -0.6],
        "ticklabelstandoff": 8,
        "zeroline": False,
        "showgrid": False,
    }


def row_height(count: int) -> int:
    """Pixels of a chart with one row per name."""
    return 110 + 24 * count


def vertical_line(at: float) -> dict[str, Any]:
    """A dotted mark across the whole height."""
    line = {"color": GREY, "dash": "dot", "width": 1.5}
    return {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def share_map(
    lines: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]], *, x: str, y: str, numbers: int, pixels: int,
) -> dict[str, Any]:  # fmt: skip
    """Heat map of shares in [0, 1], one line of `pixels` per name; written in the cells of up to `numbers` columns."""
    written = len(columns) <= numbers
    trace: dict[str, Any] = {
        "type": "heatmap", "x": list(range(len(columns))), "y": list(range(len(lines))), "z": shares,
        "zmin": 0, "zmax": 1, "colorscale": [[0, "--raised"], [1, SERIES[0]]],
        "text": texts, "hovertemplate": "%{text}<extra></extra>", "xgap": 1, "ygap": 1, "showscale": not written,
        "colorbar": {"thickness": 12, "len": 0.9, "outlinewidth": 0, "tickformat": ".0%", "tickcolor": GREY},
    }  # fmt: skip
    if written:  # paler, so that one colour of text is legible on every cell
        trace |= {"texttemplate": "%{z:.0%}", "textfont": {"color": "--ink"}, "opacity": 0.6}
    under = [visible(c if len(c) <= UNDER else f"{c[: UNDER - 1]}…") for c in columns]
    return figure(
        [trace], x=x, y=y, height=150 + pixels * len(lines) + 4 * max(map(len, under)), hovermode="closest",
        xaxis={
            **by_name(columns), "ticktext": under, "range": [-0.5, len(columns) - 0.5], "autotickangles": [0, -40, -90],
        },
        yaxis={**by_name(lines), "range": [len(lines) - 0.5, -0.5]},
    )  # fmt: skip
