"""Rows that repeat an earlier row: the same id, the same content, or nearly the same words."""

from __future__ import annotations

from array import array

from honeloom.data import optional
from honeloom.data.formats import content_digest
from honeloom.types.rows import Rejected, Row

__all__ = ["DuplicateFinder"]

_DIGEST = 16


class DuplicateFinder:
    """Remember the rows seen, and reject one that repeats an earlier one; the first is kept.

    Parameters
    ----------
    exact : bool
        Reject rows with the content of an earlier row.
    near : float or None
        Reject rows whose word 5-shingles have at least this Jaccard similarity (estimated) to those
        of an earlier row that was kept; 0 < near <= 1.

    Notes
    -----
    Takes about 350 bytes a row; `near` about 13 KB a row more.
    """

    def __init__(self, *, exact: bool, near: float | None = None) -> None:
        self._exact = exact
        self._near = None if near is None else optional.load("near").NearDuplicates(near)
        self._by_id: dict[str, int] = {}
        self._by_content: dict[bytes, int] = {}
        self._ids: list[str] = []
        self._digests = bytearray()
        self._lines = array("q")
        self._files: dict[str, int] = {}
        self._file_of = array("i")

    def check(self, row: Row) -> Rejected | None:
        """Return why the row is rejected, or None; rows must come in reading order."""
        digest = content_digest(row)
        number = len(self._ids)
        first = self._by_id.setdefault(row.id, number)
        if first != number and self._digest(first) != digest:
            reason = f"duplicate id {row.id!r} (first at {self._place(first)})"
            return Rejected(row.where, reason, row.id, "duplicate_id")
        if first == number:
            self._remember(row, digest)
        if self._exact:
            same = self._by_content.setdefault(digest, first)
            if same != number:
                return Rejected(row.where, f"exact duplicate of {self._ids[same]}", row.id, "exact_duplicate")
        if self._near is not None and (like := self._near.find_or_add(first, row)) is not None:
            return Rejected(row.where, f"near duplicate of {self._ids[like]}", row.id, "near_duplicate")
        return None

    def _remember(self, row: Row, digest: bytes) -> None:
        self._ids.append(row.id)
        self._digests += digest
        self._lines.append(row.where.line)
        self._file_of.append(self._files.setdefault(row.where.file, len(self._files)))

    def _digest(self, number: int) -> bytes:
        return bytes(self._digests[number * _DIGEST : (number + 1) * _DIGEST])

    def _place(self, number: int) -> str:
        return f"{list(self._files)[self._file_of[number]]}:{self._lines[number]}"
