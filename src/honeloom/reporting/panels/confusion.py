"""Two tables of rows as heat maps: what the probe says of every domain, and which labels are in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.reporting.panel import Panel, share_map
from honeloom.reporting.panels.domain_rows import grouped, kind_of, largest_first, names_of, read_domains
from honeloom.reporting.text import clip, number, plural
from honeloom.types.report import Report

__all__ = ["labels_panel", "probe_panel"]

ROWS, COLUMNS = 24, 16
"""Names that a heat map has room for."""
WITH_NUMBERS = 10
"""Columns up to which every cell has its share written in it."""
PIXELS = 26

Counts = npt.NDArray[np.int64]


def probe_panel(folder: Path, report: Report) -> Panel | None:
    """Rows by their pseudo-domain and by what the probe takes them for; None where the probe's choice is not known."""
    table = read_domains(folder, ("probe_domain",))
    if table is None or table["probe_domain"].null_count == len(table):
        return None
    table = table.filter(table["probe_domain"].is_valid())
    true, said = names_of(table["pseudo_domain"]), names_of(table["probe_domain"])
    order = largest_first(true)
    order += [n for n in largest_first(said) if n not in set(order)]
    right = sum(a == b for a, b in zip(true, said, strict=True))
    names, place = grouped(order, COLUMNS)
    counts = _cross(true, said, place, place, (len(names), len(names)))
    return Panel(
        title="What the probe takes rows for",
        columns=("pseudo-domain", "rows", *(f"as {n}" for n in names)),
        rows=_table(names, counts),
        figure=_heat_map(names, names, counts, "the probe's likeliest domain", "pseudo-domain"),
        note=f"Each line shares out the rows of one pseudo-domain. On the diagonal the probe agrees: it does for "
        f"{right:,} of {plural(len(true), 'row')}, {right / len(true):.1%}, none of which it learned from.",
        alt=f"Heat map of {plural(len(names), 'pseudo-domain')} by the probe's choice; it agrees for "
        f"{right / len(true):.1%} of {plural(len(true), 'row')}",
        file="scores.parquet",
    )


def labels_panel(folder: Path, report: Report) -> Panel | None:
    """Rows by their label and their pseudo-domain; None without labels, and where these are the domains."""
    table = read_domains(folder, ("domain",))
    if table is None or table["domain"].null_count == len(table):
        return None
    if kind_of(table) != "pseudo-domain" and not report.details.get("probe"):
        return None
    labels, domains = names_of(table["domain"]), names_of(table["pseudo_domain"])
    columns, at = grouped(largest_first(domains), COLUMNS)
    lines, place = grouped(largest_first(labels), ROWS)
    counts = _cross(labels, domains, place, at, (len(lines), len(columns)))
    # Labels of one domain stand together, so that agreement shows as a diagonal.
    order = np.lexsort((np.arange(len(lines)), counts.argmax(axis=1)))
    lines, counts = [lines[i] for i in order], counts[order]
    agreement = report.details.get("agreement_with_labels")
    told = ""
    if agreement is not None:
        told = f" Adjusted mutual information: {number(round(agreement, 3))} (1 is the same partition, 0 chance)."
    return Panel(
        title="Labels in each pseudo-domain",
        columns=("label", "rows", *columns),
        rows=_table(lines, counts),
        figure=_heat_map(lines, columns, counts, "pseudo-domain", "label"),
        note=f"Each line shares out the rows of one label; the method did not see the labels.{told}",
        alt=f"Heat map of {plural(len(lines), 'label')} by {plural(len(columns), 'pseudo-domain')}",
        file="scores.parquet",
    )


def _cross(
    one: Sequence[str], other: Sequence[str], row: dict[str, int], column: dict[str, int], shape: tuple[int, int]
) -> Counts:
    """Rows by the places of two names."""
    counts = np.zeros(shape, dtype=np.int64)
    np.add.at(counts, ([row[n] for n in one], [column[n] for n in other]), 1)
    return counts


def _table(names: Sequence[str], counts: Counts) -> list[tuple[Any, ...]]:
    return [(name, sum(line), *line) for name, line in zip(names, counts.tolist(), strict=True)]


def _heat_map(lines: Sequence[str], columns: Sequence[str], counts: Counts, x: str, y: str) -> dict[str, Any]:
    """Shares of every line; cells without a row stay empty."""
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = [[round(s, 4) if s else None for s in line] for line in (counts / total).tolist()]
    texts = [
        [
            f"{n:,} of {sum(line):,} rows of {clip(name, 30)}: {clip(column, 30)}"
            for n, column in zip(line, columns, strict=True)
        ]
        for name, line in zip(lines, counts.tolist(), strict=True)
    ]
    return share_map(lines, columns, shares, texts, x=x, y=y, numbers=WITH_NUMBERS, pixels=PIXELS)
