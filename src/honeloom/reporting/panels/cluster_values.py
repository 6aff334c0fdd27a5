"""Values of clusters with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import INK, Panel, by_name, figure, vertical_line
from honeloom.reporting.row_texts import find_rows
from honeloom.reporting.text import number, plural
from honeloom.reporting.valuation import best_first, has_domains, label_of_clusters, told_v, unit_of
from honeloom.types.report import Report

__all__ = ["cluster_values_panel"]

EACH = 30
"""Clusters shown from each end."""
TEXT = 160
PIXELS = 18
Z = 1.96


def cluster_values_panel(folder: Path, report: Report) -> Panel | None:
    """Values of the clusters, the best first, with 95 % intervals; None where no clusters were valued.

    Pseudo-domains are not: their value is a mean over their rows.
    """
    clusters = [] if has_domains(folder) else best_first(folder)
    if not clusters:
        return None
    gap = len(clusters) - 2 * EACH
    shown = clusters if gap <= 0 else clusters[:EACH] + clusters[-EACH:]
    called = label_of_clusters(folder)
    names = [called.get(c["cluster"], f"cluster {c['cluster']}") for c in shown]
    points = _points(shown, names, gap)
    if gap > 0:
        names.insert(EACH, f"… {gap:,} more …")
    unit = unit_of(report)
    measured = [c for c in clusters if c.get("stderr") is not None]
    apart = sum(_interval(c)[0] > 0 or _interval(c)[1] < 0 for c in measured)
    told = f"{apart:,} of {plural(len(measured), 'interval')} {'lies' if apart == 1 else 'lie'} off zero"
    part = f" Shown are the {EACH} best and the {EACH} worst of {len(clusters):,}." if gap > 0 else ""
    return Panel(
        title="Values of clusters",
        columns=("cluster", "value", "95% low", "95% high", "rows", "chance of a draw", "a row that stands for it"),
        rows=_table(folder, shown, called),
        figure=figure(
            [points], x=f"value{f' ({unit})' if unit else ''}", y="", height=110 + PIXELS * len(names),
            shapes=[vertical_line(0)], yaxis={**by_name(names), "showgrid": True, "tickfont": {"size": 12}},
        ),
        note="A value is what a cluster adds to v on average, whatever other clusters it joins; "
        f"v is {told_v(report)}. Right of the dotted line a cluster helps, left of it it harms. "
        f"Bars are 95% intervals; where two overlap widely, their order may be chance. {told}.{part}",
        alt=f"Dot chart of the values of {plural(len(shown), 'cluster')}, from {number(clusters[0]['value'])} "
        f"to {number(clusters[-1]['value'])}; {told}",
        file="clusters.parquet",
    )  # fmt: skip


def _interval(cluster: dict[str, Any]) -> tuple[float, float]:
    half = Z * cluster["stderr"]
    return cluster["value"] - half, cluster["value"] + half


def _points(shown: Sequence[dict[str, Any]], names: Sequence[str], gap: int) -> dict[str, Any]:
    """One dot per cluster; a row stays empty where clusters are left out."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [c["value"] for c in shown],
        "y": [i + (gap > 0 and i >= EACH) for i in range(len(shown))],
        "text": list(names),
        "marker": {"size": 8},
        "hovertemplate": "%{text}: %{x:.4g}<extra></extra>",
        "error_x": {
            "type": "data",
            "array": [Z * (c.get("stderr") or 0.0) for c in shown],
            "color": INK,
            "thickness": 1.2,
            "width": 3,
        },
    }


def _table(folder: Path, shown: Sequence[dict[str, Any]], called: Mapping[int, str]) -> list[tuple[Any, ...]]:
    names = [c.get("proxy_id") for c in shown]
    found = find_rows(folder, {n for n in names if n is not None})
    rows = []
    for cluster, name in zip(shown, names, strict=True):
        low, high = _interval(cluster) if cluster.get("stderr") is not None else (None, None)
        row = found.get(name or "")
        text = f"{row.prompt[:TEXT]} {row.response[:TEXT]}".strip()[:TEXT] if row else name or ""
        place = called.get(cluster["cluster"], cluster["cluster"])
        rows.append((place, cluster["value"], low, high, cluster.get("size"), cluster.get("p_select"), text))
    return rows
