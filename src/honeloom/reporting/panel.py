"""What a panel is: a title, an optional chart, and the table that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["COLOURS", "Panel", "figure"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#999999")
"""Okabe and Ito's palette, safe for colour-blind readers."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One block of the page.

    `figure` is a plotly figure as plain JSON data (SVG traces only, at most 5,000 points);
    `columns` and `rows` are its table twin.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figure: dict[str, Any] | None = None
    note: str = ""


def figure(traces: list[dict[str, Any]], *, x: str, y: str, height: int = 360, **layout: Any) -> dict[str, Any]:
    """A plotly figure with the page's axes and fonts; `layout` adds to it."""
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.5)", "automargin": True}
    return {
        "data": [{"marker": {"color": COLOURS[i % len(COLOURS)]}, **t} for i, t in enumerate(traces)],
        "layout": {
            "height": height,
            "margin": {"l": 60, "r": 20, "t": 10, "b": 60},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#808080"},
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}},
            "legend": {"orientation": "h", "y": 1.12},
            **layout,
        },
    }
