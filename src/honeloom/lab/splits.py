"""Pool, dev and test of the lab, with what is wrong in the pool and the record of it.

The pool is what a team finds: twelve sources, three of them bad, some rows wrong anywhere, some twice, some
between two domains, no labels. Dev and test are clean. ``truth`` holds the known answers about every row.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Final, Literal, NotRequired, TypedDict

from honeloom.lab.ops import Op
from honeloom.lab.world import DOMAINS, OPS, Question, ask, domain_label, draw_question, part_of, random_for, reword

__all__ = ["Row", "Split", "Truth", "rows", "truth"]

Split = Literal["pool", "dev", "test"]

SOURCES: Final = tuple(f"source-{i:02d}" for i in range(1, 13))
NOISY_SOURCES: Final = 3
ROWS_PER_SOURCE: Final = 192
WRONG_IN_NOISY_SOURCE: Final = 0.9
WRONG_ANYWHERE: Final = 0.1
EXACT_DUPLICATES: Final = 48
NEAR_DUPLICATES: Final = 48
_ROWS_PER_LABEL: Final[dict[Split, dict[bool, int]]] = {
    "pool": {True: 84, False: 195},
    "dev": {True: 30, False: 30},
    "test": {True: 60, False: 60},
}
_BETWEEN_PER_PAIR: Final = 12
_BETWEEN: Final = (
    ("compare.larger", "strings.last"),
    ("arith.add", "lists.last"),
    ("units.length", "dates.next"),
    ("lists.first", "lookup.home"),
    ("strings.capitals", "compare.more"),
    ("dates.later", "logic.ponens"),
)


class Row(TypedDict):
    """One row as a user sees it; ``domain`` is given in dev and test only."""

    id: str
    instruction: str
    input: str
    output: str
    source: str
    domain: NotRequired[str]


class Truth(TypedDict):
    """What is known about one row."""

    domain: str
    op: str
    wrong: bool
    noise: Literal["source", "row"] | None
    source: str
    duplicate_of: str | None
    between: list[str] | None
    answer: str
    taught: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row in the making; ``original`` is the place of the entry it repeats."""

    prompt: str
    answer: str
    op: str
    domain: str
    taught: bool
    between: tuple[str, str] | None = None
    source: str = "lab"
    output: str | None = None
    noise: Literal["source", "row"] | None = None
    original: int | None = None


def rows(split: Split) -> Iterator[Row]:
    """Yield the rows of a split, always the same ones in the same order.

    ``pool`` has 2,400 rows: 2,304 originals and 96 duplicates of them. The originals are 1,560 of ops the base
    model was not taught (so that tuning has something to learn), 672 of taught ops (replay), equally many of
    each domain, and 72 between two domains (a question of each in one row). They come from 12 sources of 192
    rows; three of the sources answer wrongly in 90 % of their rows, and besides, 10 % of all originals, drawn
    without regard to source, are wrong. A wrong answer is the answer of another row with the same op (for an op
    of one row, of another question), of the same length where there is one, so it looks right. Of the
    duplicates, 48 repeat a row to the letter and 48 with a small change of wording; they keep source and answer
    of their original. Labels are hidden.

    ``dev`` has 480 rows and ``test`` 960, without errors and duplicates, half of taught and half of untaught
    ops. Their ``domain`` is one of sixteen labels, equally frequent: ``strings`` for taught ops of the domain,
    ``strings+`` for untaught ones, and so on.

    No content (op and operands) is in two splits, however it is worded, nor in the base model's training text,
    save the single facts of the knowledge base, which the training text holds in full. Operands in another
    order are another content.

    Parameters
    ----------
    split : {"pool", "dev", "test"}
        Which rows.

    Yields
    ------
    Row
        With the keys ``id``, ``instruction``, ``input`` (always empty), ``output``, ``source`` and, in dev and
        test, ``domain``.

    Raises
    ------
    ValueError
        If there is no such split.
    """
    for i, entry in enumerate(_entries(_known(split))):
        row: Row = {
            "id": _name(split, i),
            "instruction": entry.prompt,
            "input": "",
            "output": entry.answer if entry.output is None else entry.output,
            "source": entry.source,
        }
        if split != "pool":
            row["domain"] = entry.domain
        yield row


def truth(split: Split) -> dict[str, Truth]:
    """Return what is known about every row of a split, by row id, in the order of the rows.

    Parameters
    ----------
    split : {"pool", "dev", "test"}
        Which rows.

    Returns
    -------
    dict[str, Truth]
        ``domain``: the label as in dev and test, for rows between two domains the first one's with a plus sign;
        ``op``: name of the op, ``first|second`` between two domains; ``wrong``: whether ``output`` is wrong;
        ``noise``: ``"source"`` or ``"row"``, why it is wrong (``"source"`` where both would apply), else None;
        ``source``; ``duplicate_of``: id of the original, else None; ``between``: the two domains, else None;
        ``answer``: the true answer; ``taught``: whether the base model was taught the op.

    Raises
    ------
    ValueError
        If there is no such split.
    """
    entries = _entries(_known(split))
    return {
        _name(split, i): {
            "domain": entry.domain,
            "op": entry.op,
            "wrong": entry.noise is not None,
            "noise": entry.noise,
            "source": entry.source,
            "duplicate_of": None if entry.original is None else _name(split, entry.original),
            "between": None if entry.between is None else list(entry.between),
            "answer": entry.answer,
            "taught": entry.taught,
        }
        for i, entry in enumerate(entries)
    }


def _known(split: Split) -> Split:
    if split not in _ROWS_PER_LABEL:
        close = difflib.get_close_matches(split, _ROWS_PER_LABEL, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"the lab has no split {split!r}; {hint}known: {', '.join(_ROWS_PER_LABEL)}")
    return split


def _name(split: Split, index: int) -> str:
    return f"{split}-{index:05d}"


@lru_cache(maxsize=3)
def _entries(split: Split) -> tuple[_Entry, ...]:
    rng = random_for("lab rows", split)
    entries = [entry for domain in DOMAINS for taught in (True, False) for entry in _draw(split, domain, taught, rng)]
    if split != "pool":
        rng.shuffle(entries)
        return tuple(entries)
    entries += [entry for pair in _BETWEEN for entry in _draw_between(pair, rng)]
    rng.shuffle(entries)
    entries = _with_errors(_with_sources(entries, rng), rng)
    return _with_duplicates(entries, rng)


def _entry(question: Question) -> _Entry:
    op = question.op
    return _Entry(question.prompt, question.answer, op.name, domain_label(op), op.taught)


def _draw(split: Split, domain: str, taught: bool, rng: Random) -> Iterator[_Entry]:
    """Draw rows with different prompts; ops that run out of contents leave their share to the others."""
    ops: list[Op] = [op for op in OPS.values() if op.domain == domain and op.taught == taught]
    seen: set[str] = set()
    while len(seen) < _ROWS_PER_LABEL[split][taught]:
        question = ask(rng.choice(ops), rng)
        if question.prompt not in seen and part_of(question.op, question.key) == split:
            seen.add(question.prompt)
            yield _entry(question)


def _draw_between(pair: tuple[str, str], rng: Random) -> Iterator[_Entry]:
    """Draw rows that ask a question of each of two domains."""
    seen: set[str] = set()
    while len(seen) < _BETWEEN_PER_PAIR:
        one, two = (draw_question(OPS[name], rng, "pool") for name in pair)
        prompt = f"{one.prompt} {two.prompt}"
        if prompt in seen:
            continue
        seen.add(prompt)
        # Names and words follow a comma with a space, as in the answers of the domains themselves.
        gap = ", " if two.answer[0].isupper() else ","
        domains = (one.op.domain, two.op.domain)
        yield _Entry(prompt, one.answer + gap + two.answer, "|".join(pair), f"{domains[0]}+", False, domains)


def _with_sources(entries: Sequence[_Entry], rng: Random) -> list[_Entry]:
    sources = [source for source in SOURCES for _ in range(ROWS_PER_SOURCE)]
    rng.shuffle(sources)
    return [replace(entry, source=source) for entry, source in zip(entries, sources, strict=True)]


def _with_errors(entries: Sequence[_Entry], rng: Random) -> list[_Entry]:
    """Give wrong answers to most rows of the bad sources and to a tenth of all rows."""
    noise: dict[int, Literal["source", "row"]] = {}
    for i in rng.sample(range(len(entries)), round(WRONG_ANYWHERE * len(entries))):
        noise[i] = "row"
    for source in rng.sample(SOURCES, NOISY_SOURCES):
        places = [i for i, entry in enumerate(entries) if entry.source == source]
        for i in rng.sample(places, round(WRONG_IN_NOISY_SOURCE * len(places))):
            noise[i] = "source"
    answers: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        answers[entry.op].append(entry.answer)
    return [
        replace(entry, noise=noise[i], output=_wrong_answer(entry, answers[entry.op], rng)) if i in noise else entry
        for i, entry in enumerate(entries)
    ]


def _wrong_answer(entry: _Entry, answers: Sequence[str], rng: Random) -> str:
    others = [answer for answer in answers if answer != entry.answer]
    while not others:  # a rare op whose few rows all have one answer: take another question of the world
        others = [answer for answer in [ask(OPS[entry.op], rng).answer] if answer != entry.answer]
    return rng.choice([answer for answer in others if len(answer) == len(entry.answer)] or others)


def _with_duplicates(entries: Sequence[_Entry], rng: Random) -> tuple[_Entry, ...]:
    """Repeat some rows, shuffle, and let every repetition point to the new place of its original."""
    chosen = rng.sample(range(len(entries)), EXACT_DUPLICATES + NEAR_DUPLICATES)
    copies = [replace(entries[i], original=i) for i in chosen]
    for k in range(EXACT_DUPLICATES, len(copies)):
        copies[k] = replace(copies[k], prompt=reword(copies[k].prompt, rng))
    together = [*entries, *copies]
    order = list(range(len(together)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    mixed = [together[old] for old in order]
    return tuple(e if e.original is None else replace(e, original=place[e.original]) for e in mixed)
