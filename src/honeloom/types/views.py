"""How records look at a prompt and in a notebook: small tables, as text and as inert HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from html import escape
from typing import Any

from honeloom.types.plans import PlannedCost, StagePlan, Volume

__all__ = ["PlanList", "html_table", "plain", "short", "size_text", "text_table", "time_text"]

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
    """The plans of stages, in order, and their `total`; at a prompt and in a notebook one line each."""

    columns = ("stage", "verb", "state", "reads", "rows", "tokens", "evaluations", "memory", "disk", "time")

    @property
    def total(self) -> dict[str, Any]:
        """Sums over the stages; of memory the largest; None where a stage does not tell.

        Keys are those of `Volume` that are numbers, `memory_bytes`, `disk_bytes`, `download_bytes`, `seconds` and
        `cpu_seconds`.
        """
        volumes = [p.volume or Volume() for p in self]
        costs = [p.cost or PlannedCost() for p in self]
        names = [f.name for f in fields(Volume) if f.type == "int"]
        found: dict[str, Any] = {name: sum(getattr(v, name) for v in volumes) for name in names}
        found["memory_bytes"] = max((c.memory_bytes or 0 for c in costs), default=0) or None
        found["disk_bytes"] = sum(c.disk_bytes for c in costs)
        # What several stages download is fetched once.
        wanted = {tuple(p.downloads): c.download_bytes for p, c in zip(self, costs, strict=True)}
        found["download_bytes"] = None if None in wanted.values() else sum(n or 0 for n in wanted.values())
        working = [c for p, c in zip(self, costs, strict=True) if p.state != "reuse"]
        for name in ("seconds", "cpu_seconds"):
            values = [getattr(c, name) for c in working]
            found[name] = None if None in values or not values else round(sum(values), 3)
        return found

    def table(self) -> list[tuple[str, ...]]:
        """Cells of `columns` for every stage, and for the total where there are several."""
        rows = [_plan_row(p) for p in self]
        if len(self) > 1:
            total = self.total
            numbers = (f"{total['rows']:,}", f"{total['tokens']:,}", f"{total['evaluations']:,}")
            sizes = (size_text(total["memory_bytes"]), size_text(total["disk_bytes"]), time_text(total["seconds"]))
            rows.append(("in all", "", "", "", *numbers, *sizes))
        return rows

    def __repr__(self) -> str:
        return text_table(self.columns, self.table())

    def _repr_html_(self) -> str:
        return html_table(self.columns, self.table())


def _plan_row(plan: StagePlan) -> tuple[str, ...]:
    """A stage's cells: `~` before what is predicted or estimated, `<=` before what may be less."""
    volume, cost = plan.volume or Volume(), plan.cost or PlannedCost()
    about = "~" if volume.predicted else ""
    most = "<=" if volume.at_most else ""
    told = volume.unknown is None
    return (
        plan.stage, plan.verb, plan.state, ", ".join(plan.inputs.values()),
        f"{about}{volume.rows:,}" if told else "?",
        f"{about or ('' if volume.counted or not volume.tokens else '~')}{volume.tokens:,}" if told else "?",
        f"{most if volume.evaluations else ''}{volume.evaluations:,}" if told else "?",
        size_text(cost.memory_bytes), size_text(cost.disk_bytes),
        f"{most}{time_text(cost.seconds)}" if cost.seconds is not None else "",
    )  # fmt: skip


def size_text(amount: int | None) -> str:
    """Bytes for a person; nothing for None."""
    if amount is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if amount >= size:
            return f"{amount / size:.{1 if amount < 100 * size else 0}f} {unit}"
    return f"{amount} B"


def time_text(seconds: float | None) -> str:
    """Seconds for a person; nothing for None."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"
