"""What forward passes told before the first zeroth-order step: curvature, batch noise, rates and distances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import SERIES, Panel, figure
from honeloom.reporting.text import number
from honeloom.types.report import Report

__all__ = ["curvature_panel", "distances_panel"]


def curvature_panel(folder: Path, report: Report) -> Panel | None:
    """The rate in force beside the rates that curvature and batch noise allow."""
    found = report.details.get("curvature")
    if not found:
        return None
    known = {name: found.get(key) for name, key in (("taken", "lr"), ("by auto", "rate"), ("up from", "ceiling"))}
    above = known["taken"] is not None and known["up from"] is not None and known["taken"] > known["up from"]
    return Panel(
        title="Curvature at the start, and the learning rate",
        columns=("quantity", "value", "± stderr"),
        rows=list(_quantities(found)),
        note=f"From {found['passes']:,} forward passes before the first step. "
        + ("The rate is above the one from which on steps go up in the mean. " if above else "")
        + "A step along a random direction pays for the whole trace, so steps to a target grow with the effective rank "
        "and not with the number of parameters. The effective rank is an upper estimate, for the largest eigenvalue is "
        "known from below.",
        alt=f"Table of the loss's curvature: trace {number(found['trace'])}, learning rate {number(known['taken'])}",
    )


def _quantities(found: Mapping[str, Any]) -> Iterator[tuple[str, float | None, float | None]]:
    yield f"learning rate ({found.get('chosen', 'measured')})", found.get("lr"), None
    yield "learning rate that auto takes", found.get("rate"), None
    yield "steps go up in the mean from", found["ceiling"], None
    yield "the same without batch noise", found["bound"], None
    yield "trace of the Hessian", found["trace"], found["trace_stderr"]
    yield "largest eigenvalue", found["largest"], found["largest_stderr"]
    yield "effective rank", found["effective_rank"], None
    yield "stable rank", found["stable_rank"], None
    yield "share of a batch's gradient that is signal", found["signal"], found["signal_stderr"]


def distances_panel(folder: Path, report: Report) -> Panel | None:
    """How much projected gradients change between neighbouring distances."""
    found = report.details.get("curvature")
    if not found or not found["ladder"]:
        return None
    mu = found.get("mu")
    points = [(m, change) for m, change, _ in found["ladder"] if change]
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [m for m, _ in points],
        "y": [change for _, change in points],
        "line": {"color": SERIES[0], "width": 2},
        "marker": {"size": [14 if m == mu else 7 for m, _ in points]},
        "hovertemplate": "mu %{x}: %{y:.4g}<extra></extra>",
    }
    log = {"type": "log", "exponentformat": "power", "dtick": 1}
    return Panel(
        title="Distances that were tried",
        columns=("mu", "change of projected gradients", "trace of the Hessian", "decision"),
        rows=[(m, change, curved, _decision(m, found)) for m, change, curved in found["ladder"]],
        figure=figure([trace], x="mu (log scale)", y="relative change (log scale)", xaxis=log, yaxis=log),
        note="The larger of the changes towards both neighbouring distances. Rounding shows on the small side, higher "
        "derivatives on the large one. A distance without numbers had a loss that was not finite.",
        alt=f"Line chart of the change of projected gradients over {len(found['ladder'])} distances; "
        f"steps take {number(mu)}",
    )


def _decision(mu: float, found: Mapping[str, Any]) -> str:
    uses = [use for use, value in (("steps", found.get("mu")), ("curvature", found["width"])) if value == mu]
    return " and ".join(uses)
