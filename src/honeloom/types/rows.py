"""Rows: the records every stage reads, whatever file format they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["RejectKind", "Rejected", "Row", "RowKind", "Turn", "Where"]

RowKind = Literal["chat", "text", "choice"]
RejectKind = Literal[
    "unreadable",
    "schema",
    "empty",
    "characters",
    "duplicate_id",
    "exact_duplicate",
    "near_duplicate",
    "target_overlap",
    "must_drop",
]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row stands: a file as the user named it, and its 1-based line or record number."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row in canonical form.

    Attributes
    ----------
    id : str
        The row's own `id`, else the blake2b-128 of its canonical JSON.
    kind : {"chat", "text", "choice"}
        `chat` has `turns` (at least one assistant turn unless it is an open prompt);
        `text` has `text`; `choice` has a question as `turns` (user only), `choices` and
        the 0-based `answer`.
    domain : str or None
        Label used for per-domain numbers; None where the rows carry none.
    source : str
        The row's own `source`, else the stem of its file.
    where : Where
        File and line, for messages.
    """

    id: str
    kind: RowKind
    where: Where
    source: str
    domain: str | None = None
    turns: tuple[Turn, ...] = ()
    text: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1

    @property
    def prompt(self) -> str:
        """All user and system text, joined by newlines; the text itself of a `text` row."""
        if self.kind == "text":
            return self.text
        return "\n".join(t.content for t in self.turns if t.role in ("user", "system"))

    @property
    def response(self) -> str:
        """All assistant text, joined by newlines; the right choice of a `choice` row."""
        if self.kind == "choice":
            return self.choices[self.answer]
        return "\n".join(t.content for t in self.turns if t.role == "assistant")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used: where it stands, its id if it has one, and why.

    `reason` is for people and names the values met; `kind` is what counts are kept by.
    """

    where: Where
    reason: str
    id: str | None = None
    kind: RejectKind = "schema"

    @property
    def is_duplicate(self) -> bool:
        """Whether the row is sound and only repeats another: such rows are not counted as bad."""
        return self.kind in ("exact_duplicate", "near_duplicate", "target_overlap", "must_drop")
