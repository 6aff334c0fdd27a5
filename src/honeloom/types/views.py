"""How records look at a prompt and in a notebook: small tables, as text and as inert HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from honeloom.types.plans import StagePlan

__all__ = ["PlanList", "html_table", "plain", "short", "text_table"]

CELL = 120


def short(value: object) -> str:
    """A value for a table cell: four significant digits, None is empty, long text is clipped."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= CELL else f"{text[:CELL]}…"


def plain(text: str) -> str:
    """One line that a terminal only prints: control characters and direction marks become `?`."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def html_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table with every text escaped; directions of text stay within their cells."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td><bdi>{escape(short(c))}</bdi></td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as aligned text."""
    cells = [[plain(c) for c in columns], *([plain(short(c)) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


class PlanList(list[StagePlan]):
    """The plans of stages, in order; at a prompt and in a notebook one line each."""

    columns = ("stage", "verb", "state", "reads", "bytes", "downloads")

    def _rows(self) -> list[tuple[object, ...]]:
        return [
            (p.stage, p.verb, p.state, ", ".join(p.inputs.values()), f"{p.bytes_in:,}", ", ".join(p.downloads))
            for p in self
        ]

    def __repr__(self) -> str:
        return text_table(self.columns, self._rows())

    def _repr_html_(self) -> str:
        return html_table(self.columns, self._rows())
