"""Mix of domains in all rows and in the kept ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import GREY, SERIES, Panel, by_name, figure, row_height
from honeloom.reporting.panels.domain_rows import counted, kind_of, largest_first, read_domains
from honeloom.reporting.panels.scores import divergence
from honeloom.reporting.text import plural
from honeloom.types.report import Report

__all__ = ["domain_mix_panel"]

SHOWN = 24
OTHERS = {"domain": "label", "source": "source"}
"""Columns that the rows came with, and what their values are called."""


def domain_mix_panel(folder: Path, report: Report) -> Panel | None:
    """Shares of every pseudo-domain before and after the choice, and by label and source in the table."""
    table = read_domains(folder, (), ("domain", "source"))
    if table is None or not any(table["selected"].to_pylist()):
        return None
    kind = kind_of(table)
    kinds = {"pseudo_domain": kind, **{c: word for c, word in OTHERS.items() if word != kind}}
    rows: list[tuple[Any, ...]] = []
    apart = {}
    for column, word in kinds.items():
        total, kept = counted(table, column) if column in table.column_names else (Counter[str](), Counter[str]())
        if len(total) > 1:
            rows += [_line(word, name, total, kept) for name in largest_first(list(total.elements()))]
            apart[word] = f"{divergence(total, kept):.3f} bits over {word}s"
    main = [r for r in rows if r[0] == kind]
    if not main:
        return None
    rest = f" The chart has the {SHOWN} largest of {len(main):,} {kind}s." if len(main) > SHOWN else ""
    also = f" The table has {' and '.join(f'{k}s' for k in apart if k != kind)} too." if len(apart) > 1 else ""
    change = max(main, key=lambda r: abs(r[5] - r[4]))
    return Panel(
        title="Mix of domains before and after",
        columns=("kind", "name", "rows", "kept", "share of all", "share of kept"),
        rows=[(*r[:4], f"{r[4]:.1%}", f"{r[5]:.1%}") for r in rows],
        figure=_chart(main[:SHOWN]),
        note=f"Jensen–Shannon divergence of the kept rows from all rows: {_listed(list(apart.values()))} (0 is the "
        f"same mix, 1 none shared).{also}{rest}",
        alt=f"Bar chart of the shares of {plural(len(main[:SHOWN]), kind)} in all rows and in the kept ones; "
        f"the largest change is from {change[4]:.1%} to {change[5]:.1%}",
        file="scores.parquet",
    )


def _line(kind: str, name: str, total: Counter[str], kept: Counter[str]) -> tuple[Any, ...]:
    return kind, name, total[name], kept[name], total[name] / total.total(), kept[name] / kept.total()


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _chart(main: list[tuple[Any, ...]]) -> dict[str, Any]:
    names = [r[1] for r in main]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": [r[column] for r in main],
            "y": list(range(len(main))),
            "text": names,
            "textposition": "none",
            "marker": {"color": colour},
            "hovertemplate": f"%{{text}}: %{{x:.1%}}<extra>{name}</extra>",
        }
        for name, column, colour in (("all rows", 4, GREY), ("kept rows", 5, SERIES[0]))
    ]
    return figure(
        traces, x="share of the rows", y="", height=row_height(len(main)) + 10 * len(main), barmode="group",
        xaxis={"tickformat": ".0%", "rangemode": "tozero"}, yaxis=by_name(names), legend=_legend(),
    )  # fmt: skip


def _legend() -> dict[str, Any]:
    """Above the chart, in the order of the bars from the top."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "traceorder": "normal"}
