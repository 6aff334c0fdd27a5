"""What the panels about domains read, and how they name, order and group domains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from honeloom.reporting.valuation import read_columns

__all__ = ["NONE", "counted", "grouped", "kind_of", "largest_first", "names_of", "read_domains"]

NONE = "(none)"
"""What rows without a domain, or without a label, are called."""


def read_domains(folder: Path, needed: Sequence[str] = (), more: Sequence[str] = ()) -> pa.Table | None:
    """Rows with `pseudo_domain`, `selected` and further columns; None where a needed column or every domain is absent.

    Those of `more` that hold nothing are left out.
    """
    table = read_columns(folder / "scores.parquet", ("pseudo_domain", "selected", *needed), more)
    if table is None or table["pseudo_domain"].null_count == len(table):
        return None
    empty = [n for n in more if n in table.column_names and table[n].null_count == len(table)]
    return table.drop_columns(empty) if empty else table


def names_of(column: pa.ChunkedArray) -> list[str]:
    """Names of a column; `NONE` where there is none."""
    return [NONE if name is None else str(name) for name in column.to_pylist()]


def kind_of(table: pa.Table) -> str:
    """What the domains are: labels or sources where they have the same names row by row, else pseudo-domains."""
    for column, kind in (("domain", "label"), ("source", "source")):
        if column not in table.column_names:
            continue
        both = table.filter(pc.and_(table[column].is_valid(), table["pseudo_domain"].is_valid()))
        if len(both) and both[column].equals(both["pseudo_domain"]):
            return kind
    return "pseudo-domain"


def largest_first(names: Sequence[str]) -> list[str]:
    """Different names, the most frequent first, those of equal number by name, and `NONE` last."""
    counts = Counter(names)
    return sorted(counts, key=lambda n: (n == NONE, -counts[n], n))


def grouped(names: Sequence[str], most: int) -> tuple[list[str], dict[str, int]]:
    """At most `most` headings for names, and the place of every name among them: the last few share one."""
    shown = list(names) if len(names) <= most else list(names[: most - 1])
    place = {name: min(i, most - 1) for i, name in enumerate(names)}
    if len(names) > most:
        shown.append(f"{len(names) - most + 1:,} others")
    return shown, place


def counted(table: pa.Table, column: str) -> tuple[Counter[str], Counter[str]]:
    """Rows of every name in a column: all, and kept."""
    names = names_of(table[column])
    kept = [n for n, k in zip(names, table["selected"].to_pylist(), strict=True) if k]
    return Counter(names), Counter(kept)
