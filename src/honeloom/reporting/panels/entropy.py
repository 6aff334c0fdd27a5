"""Histogram of the probe's entropy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.reporting.panel import GREY, INK, SERIES, Panel, figure, vertical_line
from honeloom.reporting.panels.domain_rows import read_domains
from honeloom.reporting.text import number, plural
from honeloom.types.report import Report

__all__ = ["entropy_panel"]

BINS = 40
STEEP = 20
"""The axis of counts is logarithmic where the fullest bar has this many times the rows of the middle one."""


def entropy_panel(folder: Path, report: Report) -> Panel | None:
    """Entropy of all rows and of the kept ones, from 0 to that of equal chances; None without entropies."""
    table = read_domains(folder, ("entropy",))
    if table is None or table["entropy"].null_count == len(table):
        return None
    known = table.filter(table["entropy"].is_valid())
    entropy, kept = known["entropy"].to_numpy(), known["selected"].to_numpy()
    most, equal = _most(report, entropy)
    bins = np.clip(entropy / (most / BINS), 0, BINS - 1).astype(int)
    every, chosen = (np.bincount(bins[which], minlength=BINS).tolist() for which in (kept | True, kept))
    edges = [most * i / BINS for i in range(BINS + 1)]
    missing = len(table) - len(known)
    steep = max(every) > STEEP * float(np.median([n for n in every if n]))
    scale = " The axis of rows is logarithmic." if steep else ""
    unscored = f" {plural(missing, 'row')} without an entropy stand in neither." if missing else ""
    return Panel(
        title="How unsure the probe is",
        columns=("entropy from", "to", "all rows", "kept"),
        rows=list(zip(edges[:-1], edges[1:], every, chosen, strict=True)),
        figure=_chart(every, chosen, most, steep, equal),
        note=f"Entropy in nats of what the probe says of a row it did not learn from: 0 is sure, {most:.3g}"
        f"{f', at the dotted line, is {equal}' if equal else ' is the highest'}. {_medians(entropy, kept)}{scale}"
        f"{unscored}",
        alt=f"Histogram of the entropy of {plural(len(known), 'row')}, all and kept, from "
        f"{number(float(entropy.min()))} to {number(float(entropy.max()))} nats of {number(most)}",
        file="scores.parquet",
    )


def _most(report: Report, entropy: npt.NDArray[np.float64]) -> tuple[float, str]:
    """The end of the axis, and what it means where that is known."""
    domains = len(report.details.get("domains") or ())
    told = (report.details.get("probe") or {}).get("most_entropy") or (math.log(domains) if domains > 1 else None)
    if told is None:
        return float(entropy.max()) or 1.0, ""
    return float(told), f"that of equal chances for {round(math.exp(told))} domains"


def _chart(every: list[int], chosen: list[int], most: float, steep: bool, equal: str) -> dict[str, Any]:
    middle = [most * (i + 0.5) / BINS for i in range(BINS)]
    looks = (("all rows", every, GREY), ("kept", chosen, SERIES[0]))
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": middle,
            "y": counts,
            "marker": {"color": colour},
            "hovertemplate": f"around %{{x:.3g}} nats: %{{y}} rows<extra>{name}</extra>",
        }
        for name, counts, colour in looks
    ]
    axis: dict[str, Any] = {"rangemode": "tozero"}
    if steep:
        axis = {"type": "log", "dtick": 1, "range": [math.log10(0.5), math.log10(max(every)) + 0.1]}
    marks: list[dict[str, Any]] = []
    if equal:
        text = {"text": "most", "x": most, "y": 1, "yref": "paper", "xanchor": "right", "yanchor": "top"}
        marks = [{**text, "showarrow": False, "xshift": -4, "font": {"color": INK}}]
    return figure(
        traces, x="entropy (nats)", y="rows", barmode="overlay", bargap=0.05, annotations=marks,
        shapes=[vertical_line(most)] * bool(equal), xaxis={"range": [0, most * 1.02]}, yaxis=axis,
    )  # fmt: skip


def _medians(entropy: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]) -> str:
    every = f"{np.median(entropy):.3g}"
    if not kept.any():
        return f"The median is {every}."
    return f"The median is {np.median(entropy[kept]):.3g} of kept rows and {every} of all."
