"""Questions that stand both in training and in evaluation rows, by a digest of their words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from hashlib import blake2b
from typing import Any

from honeloom.data import optional
from honeloom.types.rows import Row

__all__ = ["overlap", "question_digest", "question_digests", "repeats"]

_NOT_WORD = re.compile(r"[\W_]+")
# Shorter prompts ("True or false?") are the same in unrelated rows.
_FEWEST_WORDS = 3
_EXAMPLES = 5
NEAR = 0.8
"""Jaccard similarity of word 5-shingles from which rows are nearly the same."""


def question_digest(row: Row) -> bytes | None:
    """Return 8 bytes that are equal for questions of equal letters and digits, or None under 3 words.

    Case, punctuation and spacing do not count, nor do system texts.
    """
    asked = row.text if row.kind == "text" else "\n".join(t.content for t in row.turns if t.role == "user")
    words = _NOT_WORD.sub(" ", asked.lower()).strip()
    if words.count(" ") < _FEWEST_WORDS - 1:
        return None
    return blake2b(words.encode(), digest_size=8).digest()


def question_digests(rows: Iterable[Row]) -> set[bytes]:
    """Return the digests of all rows that have one: about 70 bytes of memory each."""
    return {digest for row in rows if (digest := question_digest(row)) is not None}


def overlap(train_digests: Set[bytes], rows: Iterable[Row]) -> dict[str, Any]:
    """Find the rows whose question is among the training questions.

    Parameters
    ----------
    train_digests : set of bytes
        From `question_digests` of the training rows.
    rows : iterable of Row
        The evaluation rows.

    Returns
    -------
    dict
        `rows`, the number of rows found; `files`, that number by file; `examples`, the first five
        as {id, where}.
    """
    files: Counter[str] = Counter()
    examples: list[dict[str, str]] = []
    for row in rows:
        if question_digest(row) in train_digests:
            files[row.where.file] += 1
            if len(examples) < _EXAMPLES:
                examples.append({"id": row.id, "where": str(row.where)})
    return {"rows": files.total(), "files": dict(files), "examples": examples}


def repeats(target: Iterable[Row], rows: Iterable[Row]) -> Iterator[tuple[int, Row, str]]:
    """Find the rows that repeat a row of the target: the same question, or nearly the same words.

    Parameters
    ----------
    target : iterable of Row
        About 13 KB of memory each.
    rows : iterable of Row
        Streamed once.

    Yields
    ------
    tuple
        Place among `rows`, the row, and "the question" or "nearly the words", which it repeats.
    """
    near = optional.load("near").NearDuplicates(NEAR)
    digests: set[bytes] = set()
    for number, row in enumerate(target):
        near.find_or_add(number, row)
        if (digest := question_digest(row)) is not None:
            digests.add(digest)
    for place, row in enumerate(rows):
        if question_digest(row) in digests:
            yield place, row, "the question"
        elif near.find(row) is not None:
            yield place, row, "nearly the words"
