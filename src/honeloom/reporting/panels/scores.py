"""Scores of a selection, and what was kept of each group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from honeloom.reporting.panel import GREY, Panel, by_name, figure, row_height, vertical_line
from honeloom.reporting.text import number, plural
from honeloom.types.report import Report

__all__ = ["divergence", "kept_panel", "scores_panel"]

BINS = 40
GROUPS = 30


def scores_panel(folder: Path, report: Report) -> Panel | None:
    """Histogram of scores, kept and left out; None where all are missing or equal.

    None as well where they are entropies, which have a panel of their own. The outermost 5 % on
    each side are counted in the first and the last bar.
    """
    if report.details.get("reward") == "entropy" and "entropy" in pq.read_schema(folder / "scores.parquet").names:
        return None
    table = pq.read_table(folder / "scores.parquet", columns=["score", "selected"])
    known = table.filter(table["score"].is_valid())
    scores, selected = known["score"].to_numpy().astype(float), known["selected"].to_numpy()
    if len(scores) == 0 or scores.min() == scores.max():
        return None
    ranked = np.sort(scores)
    low, high = float(ranked[len(ranked) // 20]), float(ranked[-1 - len(ranked) // 20])
    width = (high - low) / BINS or 1.0
    bins = np.clip((scores - low) / width, 0, BINS - 1).astype(int)
    kept, left = (np.bincount(bins[selected == k], minlength=BINS).tolist() for k in (True, False))
    edges = [low + i * width for i in range(BINS)]
    middle = [e + width / 2 for e in edges]
    hover = "around %{x:.4g}: %{y} rows<extra></extra>"
    traces: list[dict[str, Any]] = [
        {"type": "bar", "name": name, "x": middle, "y": counts, "hovertemplate": hover}
        for name, counts in (("kept", kept), ("left out", left))
    ]
    traces[1]["marker"] = {"color": GREY}
    missing = len(table) - len(known)
    unscored = f" {plural(missing, 'row')} without a score stand in neither." if missing else ""
    return Panel(
        title=f"Scores of {report.details['method']}",
        columns=("score from", "to", "kept", "left out"),
        rows=[(e, e + width, k, n) for e, k, n in zip(edges, kept, left, strict=True)],
        figure=figure(traces, x="score", y="rows", barmode="stack", bargap=0.05),
        note=f"The first and the last bar also count the outermost 5% on their side.{unscored}",
        alt=f"Histogram of {len(known):,} scores from {number(low)} to {number(high)}, kept and left out",
        file="scores.parquet",
    )


def kept_panel(folder: Path, report: Report) -> Panel | None:
    """Share kept of every domain (or source, or cluster), and how far the mix differs from that of all rows.

    None where there is one source and rows are told apart by pseudo-domains only.
    """
    file = folder / "scores.parquet"
    names = pq.read_schema(file).names
    of_domains = "pseudo_domain" in names  # clusters are these, and have a panel of their own
    have = [c for c in ("domain", "source", "cluster", "tokens") if c in names and not (of_domains and c == "cluster")]
    table = pq.read_table(file, columns=[*have, "selected"])
    by = _grouping(table)
    if of_domains and by == "source" and len(table["source"].unique()) == 1:
        return None
    total, kept = _counts(table, by)
    names = [g for g, _ in total.most_common()]
    largest = "largest of"
    if by == "cluster":  # many, of no meaning by name: those that the choice went to are of interest
        names.sort(key=lambda g: -kept[g])
        largest = "most often kept of"
    shown = names[:GROUPS]
    shares = [kept[g] / total[g] for g in names]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": shares[:GROUPS],
        "y": list(range(len(shown))),
        "text": shown,
        "textposition": "none",
        "hovertemplate": "%{text}: %{x:.1%}<extra></extra>",
    }
    overall = sum(kept.values()) / sum(total.values())
    rest = f" The chart has the {len(shown)} {largest} {len(names):,} groups." if len(names) > len(shown) else ""
    return Panel(
        title=f"Share kept by {by}",
        columns=(by, "rows", "kept", "share"),
        rows=[(g, total[g], kept[g], s) for g, s in zip(names, shares, strict=True)],
        figure=figure(
            [trace], x="share kept", y="", height=row_height(len(shown)), shapes=[vertical_line(overall)],
            xaxis={"tickformat": ".0%", "rangemode": "tozero"}, yaxis=by_name(shown),
        ),
        note=f"The dotted line is the share over all rows, {overall:.1%}.{rest}{_mix(table, by)}{_lengths(table)}",
        alt=f"Bar chart of the share kept in {len(shown)} groups, from {min(shares):.0%} to {max(shares):.0%}",
        file="scores.parquet",
    )  # fmt: skip


def _grouping(table: pa.Table) -> str:
    """The domain, else the source; where all rows have the same source, the cluster if there is one."""
    if table["domain"].null_count < len(table):
        return "domain"
    clustered = "cluster" in table.column_names and table["cluster"].null_count < len(table)
    return "cluster" if clustered and len(table["source"].unique()) == 1 else "source"


def _counts(table: pa.Table, by: str) -> tuple[Counter[str], Counter[str]]:
    """Rows of every group: all, and kept."""
    total: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for row in table.group_by([by, "selected"], use_threads=False).aggregate([([], "count_all")]).to_pylist():
        group = f"cluster {row[by]}" if by == "cluster" and row[by] is not None else row[by] or "(none)"
        total[group] += row["count_all"]
        kept[group] += row["count_all"] * row["selected"]
    return total, kept


def _mix(table: pa.Table, by: str) -> str:
    """How far the kept rows' mix of groups is from that of all rows."""
    over = [by] + ["cluster"] * ("cluster" in table.column_names and by != "cluster")
    counts = [(name, *_counts(table, name)) for name in over if table[name].null_count < len(table)]
    found = [f"{divergence(total, kept):.2f} bits over {name}" for name, total, kept in counts if len(total) > 1]
    if not found or not any(table["selected"].to_pylist()):
        return ""
    told = " and ".join(found)
    return f" Jensen–Shannon divergence of the kept rows from all rows: {told} (0 is the same mix, 1 none shared)."


def divergence(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Jensen–Shannon divergence of two counts over the same groups, in bits: 0 to 1.

    Parameters
    ----------
    one, other : mapping of str to int
        Counts by group, neither all zero; a group that is absent counts 0.
    """
    names = sorted({*one, *other})
    p, q = (np.array([c.get(n, 0) for n in names], dtype=float) / sum(c.values()) for c in (one, other))
    middle = (p + q) / 2
    parts = [float(np.sum(r[r > 0] * np.log2(r[r > 0] / middle[r > 0]))) for r in (p, q)]
    return max(0.0, sum(parts) / 2)


def _lengths(table: pa.Table) -> str:
    """Length of the kept rows against all, where the method counted tokens."""
    if "tokens" not in table.column_names or not any(table["selected"].to_pylist()):
        return ""
    tokens = table["tokens"].to_numpy().astype(float)
    kept, every = (float(np.nanmedian(t)) for t in (tokens[table["selected"].to_numpy()], tokens))
    return f" Median length: {number(kept)} tokens of a kept row, {number(every)} of any row."
