"""The lab's world: all ops together, the split of their contents, and the base model's training text.

Which split a question belongs to is a hash of what it asks (op and operands), never of its wording: two
phrasings of one question can not end up on both sides of a fence. Ops the base model was taught give it 70 %
of their contents; untaught ops give it none. What remains is shared among pool, dev and test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Final, Literal

from honeloom.lab.ops import NUMBER_OPS, Op
from honeloom.lab.ops_words import WORD_OPS, plain_facts

__all__ = [
    "DOMAINS",
    "OPS",
    "Part",
    "Question",
    "ask",
    "domain_label",
    "draw_question",
    "part_of",
    "plain_facts",
    "pretraining",
    "random_for",
    "reword",
    "vocabulary_words",
]

Part = Literal["pretrain", "pool", "dev", "test"]

DOMAINS: Final = ("arith", "compare", "strings", "lists", "logic", "lookup", "units", "dates")
"""The eight domains. Ops the base model was not taught carry the label ``domain+``."""

OPS: Final[Mapping[str, Op]] = MappingProxyType({op.name: op for op in (*NUMBER_OPS, *WORD_OPS)})
"""Every op by its name ``domain.op``."""

_BOUNDS: Final[dict[bool, tuple[tuple[Part, int], ...]]] = {
    True: (("pretrain", 70), ("pool", 80), ("dev", 88), ("test", 100)),
    False: (("pool", 50), ("dev", 70), ("test", 100)),
}
_SHARES: Final = {
    **{"arith": 1.3, "compare": 1.1, "strings": 1.1, "lists": 1.3},
    **{"logic": 0.9, "lookup": 1.1, "units": 0.7, "dates": 0.7},
}
_DOMAIN_WEIGHT: Final = {
    domain: share / sum(op.weight for op in OPS.values() if op.domain == domain and op.taught)
    for domain, share in _SHARES.items()
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the world with its true answer."""

    op: Op
    key: str
    prompt: str
    answer: str


def random_for(*names: object) -> Random:
    """Return a generator seeded by SHA-256 of the names, the same in every process and Python version."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return Random(int.from_bytes(digest[:8], "big"))


def domain_label(op: Op) -> str:
    """Return ``domain`` for a taught op and ``domain+`` for an untaught one."""
    return op.domain if op.taught else f"{op.domain}+"


def part_of(op: Op, key: str) -> Part:
    """Return the part of the world that a content belongs to.

    Parameters
    ----------
    op : Op
        The op asked.
    key : str
        The content, ``Question.key``.

    Returns
    -------
    Part
        Facts (``op.everywhere``) also occur in the base model's training text, whatever this returns.
    """
    number = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100
    bounds = _BOUNDS[op.taught and not op.everywhere]
    return next(part for part, bound in bounds if number < bound)


def ask(op: Op, rng: Random) -> Question:
    """Draw one question of an op, of any part."""
    fields, answer = op.draw(rng)
    domain, _, name = op.name.partition(".")
    key = repr((domain, name, sorted(fields.items())))
    return Question(op, key, rng.choice(op.templates).format(**fields), answer)


def draw_question(op: Op, rng: Random, part: Part, tries: int = 10_000) -> Question:
    """Draw one question of an op that belongs to a part.

    Raises
    ------
    ValueError
        If no draw falls in the part: an untaught op has nothing in ``"pretrain"``, and an op with a dozen
        contents may have none in a small part.
    """
    for _ in range(tries):
        question = ask(op, rng)
        if (part == "pretrain" and op.everywhere) or part_of(op, question.key) == part:
            return question
    raise ValueError(f"{op.name} has no content in the part {part!r} after {tries} draws")


def pretraining(seed: int) -> Iterator[Question]:
    """Yield taught questions of the part ``"pretrain"`` for ever, domains and ops by their weights.

    One question in 25 is worded a little differently (a word in front, or no final mark), so that the near
    duplicates of the pool are not foreign to the base model.

    Parameters
    ----------
    seed : int
        Names the stream; equal seeds give equal streams.
    """
    rng = random_for("pretraining", seed)
    ops = [op for op in OPS.values() if op.taught]
    weights = [op.weight * _DOMAIN_WEIGHT[op.domain] for op in ops]
    while True:
        for op in rng.choices(ops, weights, k=1000):
            question = draw_question(op, rng, "pretrain")
            if rng.random() < 0.04:
                yield Question(op, question.key, reword(question.prompt, rng), question.answer)
            else:
                yield question


def reword(prompt: str, rng: Random) -> str:
    """Return the prompt with a word in front or without its final mark: a near duplicate of it."""
    if prompt[-1] in ".?" and rng.random() < 0.5:
        return prompt[:-1]
    return f"Question: {prompt}"


def vocabulary_words(texts: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the sorted words of all templates, facts and further texts (letters only, as written)."""
    sources = [t for op in OPS.values() for t in op.templates] + list(plain_facts()) + list(texts)
    return tuple(sorted({word for text in sources for word in _words(text)}))


def _words(text: str) -> Iterator[str]:
    """Words of a template: runs of two letters or more, fields in braces left out."""
    outside = "".join(piece.rpartition("}")[2] + " " for piece in text.split("{"))
    for piece in "".join(c if c.isalpha() else " " for c in outside).split():
        if len(piece) > 1 or piece == "a":
            yield piece
