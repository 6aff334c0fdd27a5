"""How far the values of a valuation can be trusted: noise, budget, agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from honeloom.reporting.panel import Panel
from honeloom.reporting.text import alike, number, plural
from honeloom.reporting.valuation import told_v
from honeloom.types.report import Report

__all__ = ["trust_panel"]


def trust_panel(folder: Path, report: Report) -> Panel | None:
    """What was spent, how noisy one evaluation is, and whether the ranking holds; None without a measured noise."""
    d = report.details
    if not d.get("noise") or not d.get("players"):
        return None
    development = d.get("development")
    scored = "the development rows"
    if development:
        place = "the target" if development["from"] == "target" else "the pool, held out for it"
        scored = f"{plural(development['rows'], 'row')} of {place}"
    return Panel(
        title="How far the values can be trusted",
        columns=("what", "measured", "what it means"),
        rows=[*_spent(report), *_noise(report), *_agreement(report)],
        note=f"One evaluation tunes the model on the rows that stand for some of the clusters, and scores it on "
        f"{scored}: that score is v, {told_v(report)}. Values follow from many such evaluations.",
    )


def _spent(report: Report) -> list[tuple[str, str, str]]:
    d = report.details
    budget = f" of {number(d['budget'])}" if d.get("budget") is not None else ""
    failed = f"{number(d['failed'])} failed and told nothing" if d.get("failed") else "none failed"
    rows = [("evaluations", f"{number(d['evaluations'])}{budget}", f"spent of the budget; {failed}")]
    ends = [v for v in (d.get("empty"), d.get("full")) if v is not None]
    if len(ends) == 2:
        empty, full = alike(*ends)
        rows.append(("v of no cluster", empty, "the model as it was given"))
        gained = "better" if ends[1] > ends[0] else "no better"
        rows.append(("v of all clusters", full, f"tuned on the rows of every cluster: {gained} than untuned"))
    return rows


def _noise(report: Report) -> list[tuple[str, str, str]]:
    noise: dict[str, Any] = report.details["noise"]
    rows = []
    if noise.get("sd") is not None:
        meaning = "standard deviation of v when the same evaluation is made again with its rows in another order"
        rows.append(("noise of one evaluation", number(noise["sd"]), meaning))
    if noise.get("margin") is not None:
        meaning = f"v of all less v of none, divided by {plural(report.details['players'], 'cluster')}"
        if noise.get("sd"):
            meaning += f"; {abs(noise['margin']) / noise['sd']:.2g} times the noise"
        rows.append(("mean value of a cluster", number(noise["margin"]), meaning))
    if noise.get("predicted_rho") is not None:
        meaning = "foretold before the budget was spent, from the two lines above: 1 is a perfect ranking, 0 is chance"
        rows.append(("predicted correlation with true values", number(round(noise["predicted_rho"], 3)), meaning))
    meaning = {
        True: "judged by the values themselves: they differ by more than their errors explain",
        False: "errors explain most of the differences: take the order as little better than chance",
        None: "values and noise could not be told apart",
    }[noise.get("resolvable")]
    rows.append(("ranking resolvable", {True: "yes", False: "NO", None: "not known"}[noise.get("resolvable")], meaning))
    return rows


def _agreement(report: Report) -> list[tuple[str, str, str]]:
    d = report.details
    rows = []
    if d.get("surrogate_correlation") is not None:
        meaning = (
            "rank correlation of the values with cheap ones from a single tuning: 1 is the same order, 0 unrelated"
        )
        rows.append(("agreement with the surrogate", number(round(d["surrogate_correlation"], 3)), meaning))
    if d.get("effective_clusters") is not None:
        meaning = (
            f"as free a draw as among so many equally likely clusters, of {d['players']:,}; near 1, one fills most"
        )
        rows.append(("effective clusters of the draw", number(round(d["effective_clusters"], 1)), meaning))
    return rows
