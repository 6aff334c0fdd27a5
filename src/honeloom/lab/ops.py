"""What an op of the lab is, and the four domains made of numbers: arith, compare, lists, units.

An op draws the operands of one question and works out its answer. The wording lies in templates beside it,
so that what a row asks and how it is phrased stay apart: the splits go by content, never by text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Final

from honeloom.lab.names import UNIT_PAIRS

__all__ = ["NUMBER_OPS", "Draw", "Fields", "Op", "many"]

Fields = Mapping[str, str | int]
Draw = Callable[[Random], tuple[Fields, str]]


@dataclass(frozen=True, slots=True)
class Op:
    """One kind of question.

    Parameters
    ----------
    name : str
        ``domain.op``, unique in the lab.
    draw : Callable[[Random], tuple[Fields, str]]
        Draws the operands and works out the answer.
    templates : tuple[str, ...]
        Phrasings, filled with the operands by ``str.format``.
    taught : bool
        Whether the base model has seen the op; if not, it is a composition of ops that it has seen.
    weight : float
        Share among the ops of its domain in the base model's training text.
    everywhere : bool
        True for facts that cannot be inferred: the base model's training text holds all of them.
    """

    name: str
    draw: Draw
    templates: tuple[str, ...]
    taught: bool = True
    weight: float = 1.0
    everywhere: bool = False

    @property
    def domain(self) -> str:
        """Name of the domain, without the mark of untaught ops."""
        return self.name.partition(".")[0]


def many(domain: str, taught: bool, table: Mapping[str, tuple[Draw, tuple[str, ...], float]]) -> tuple[Op, ...]:
    """Turn rows ``op: (draw, templates, weight)`` of one domain into ops."""
    return tuple(Op(f"{domain}.{name}", draw, text, taught, weight) for name, (draw, text, weight) in table.items())


def _add(rng: Random) -> tuple[Fields, str]:
    a, b = rng.randrange(50), rng.randrange(50)
    return {"a": a, "b": b}, str(a + b)


def _add3(rng: Random) -> tuple[Fields, str]:
    a, b, c = rng.randrange(10), rng.randrange(10), rng.randrange(10)
    return {"a": a, "b": b, "c": c}, str(a + b + c)


def _double(rng: Random) -> tuple[Fields, str]:
    a = rng.randrange(100)
    return {"a": a}, str(2 * a)


def _ordered(rng: Random, top: int) -> tuple[int, int]:
    """Two numbers below ``top``, the larger first."""
    a, b = rng.randrange(top), rng.randrange(top)
    return max(a, b), min(a, b)


def _sub(rng: Random) -> tuple[Fields, str]:
    a, b = _ordered(rng, 61)
    return {"a": a, "b": b}, str(a - b)


def _sum_and_difference(rng: Random) -> tuple[Fields, str]:
    a, b = _ordered(rng, 50)
    return {"a": a, "b": b}, f"{a + b},{a - b}"


def _doubles(rng: Random) -> tuple[Fields, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    return {"a": a, "b": b}, f"{2 * a},{2 * b}"


def _two_sums(rng: Random) -> tuple[Fields, str]:
    a, b, c, d = (rng.randrange(10) for _ in range(4))
    return {"a": a, "b": b, "c": c, "d": d}, f"{a + b},{c + d}"


def _sum_and_double(rng: Random) -> tuple[Fields, str]:
    a, b = rng.randrange(50), rng.randrange(50)
    return {"a": a, "b": b}, f"{a + b},{2 * a}"


_ARITH: Final = many(
    "arith",
    True,
    {
        "add": (_add, ("What is {a} plus {b}?", "Add {a} and {b}.", "{a}+{b}="), 1.2),
        "add3": (_add3, ("What is {a} plus {b} plus {c}?", "Add {a}, {b} and {c}.", "{a}+{b}+{c}="), 0.8),
        "double": (_double, ("What is twice {a}?", "Double {a}."), 0.6),
        "sub": (_sub, ("What is {a} minus {b}?", "Take {b} from {a}.", "{a}-{b}="), 1.8),
    },
) + many(
    "arith",
    False,
    {
        "sum_diff": (
            _sum_and_difference,
            ("What is {a} plus {b}, and {a} minus {b}?", "Add {a} and {b}. Take {b} from {a}."),
            1,
        ),
        "doubles": (_doubles, ("What is twice {a} and twice {b}?", "Double {a} and {b}."), 1),
        "two_sums": (_two_sums, ("What is {a} plus {b}, and {c} plus {d}?", "Add {a} and {b}. Add {c} and {d}."), 1),
        "sum_double": (_sum_and_double, ("What is {a} plus {b}, and twice {a}?", "Add {a} and {b}. Double {a}."), 1),
    },
)


def _pair(rng: Random) -> tuple[int, int]:
    """Two different numbers below 100, in any order."""
    a, b = rng.sample(range(100), 2)
    return a, b


def _larger(rng: Random) -> tuple[Fields, str]:
    a, b = _pair(rng)
    return {"a": a, "b": b}, str(max(a, b))


def _smaller(rng: Random) -> tuple[Fields, str]:
    a, b = _pair(rng)
    return {"a": a, "b": b}, str(min(a, b))


def _more(rng: Random) -> tuple[Fields, str]:
    a, b = _pair(rng)
    return {"a": a, "b": b}, "Yes" if a > b else "No"


def _sort(rng: Random) -> tuple[Fields, str]:
    numbers, up = rng.sample(range(100), 3), rng.random() < 0.5
    answer = ",".join(map(str, sorted(numbers, reverse=not up)))
    return {"items": ",".join(map(str, numbers)), "way": "up" if up else "down"}, answer


def _both(rng: Random) -> tuple[Fields, str]:
    a, b = _pair(rng)
    return {"a": a, "b": b}, f"{min(a, b)},{max(a, b)}"


def _verdict(rng: Random) -> tuple[Fields, str]:
    a, b = _pair(rng)
    return {"a": a, "b": b}, f"{'Yes' if a > b else 'No'},{max(a, b)}"


def _pairs(rng: Random) -> tuple[Fields, str]:
    (a, b), (c, d) = _pair(rng), _pair(rng)
    return {"a": a, "b": b, "c": c, "d": d}, f"{max(a, b)},{max(c, d)}"


def _cross(rng: Random) -> tuple[Fields, str]:
    (a, b), (c, d) = _pair(rng), _pair(rng)
    return {"a": a, "b": b, "c": c, "d": d}, f"{min(a, b)},{max(c, d)}"


_COMPARE: Final = many(
    "compare",
    True,
    {
        "larger": (_larger, ("Which is larger, {a} or {b}?", "Larger of {a} and {b}."), 0.8),
        "smaller": (_smaller, ("Which is smaller, {a} or {b}?", "Smaller of {a} and {b}."), 0.8),
        "more": (_more, ("Is {a} more than {b}?", "Is {a} larger than {b}?"), 0.8),
        "sort": (_sort, ("Sort {items} {way}.", "Put {items} in order, {way}."), 1.6),
    },
) + many(
    "compare",
    False,
    {
        "both": (_both, ("Which is smaller and larger, {a} or {b}?", "Smaller and larger of {a} and {b}."), 1),
        "verdict": (
            _verdict,
            ("Is {a} more than {b}? Which is larger?", "Is {a} larger than {b}? Larger of {a} and {b}."),
            1,
        ),
        "pairs": (
            _pairs,
            ("Which is larger, {a} or {b}, and {c} or {d}?", "Larger of {a} and {b}. Larger of {c} and {d}."),
            1,
        ),
        "cross": (
            _cross,
            (
                "Which is smaller, {a} or {b}? Which is larger, {c} or {d}?",
                "Smaller of {a} and {b}. Larger of {c} and {d}.",
            ),
            1,
        ),
    },
)


def _from_list(rule: Callable[[list[int]], str], fewest: int = 3, most: int = 6) -> Draw:
    """Draw a list of different numbers below 100 and answer by ``rule``."""

    def draw(rng: Random) -> tuple[Fields, str]:
        numbers = rng.sample(range(100), rng.randint(fewest, most))
        return {"items": ",".join(map(str, numbers))}, rule(numbers)

    return draw


def _of_list(phrase: str) -> tuple[str, ...]:
    return (f"{phrase} number of {{items}}.", f"What is the {phrase.lower()} number of {{items}}?")


_LISTS: Final = many(
    "lists",
    True,
    {
        "first": (_from_list(lambda n: str(n[0])), _of_list("First"), 0.8),
        "second": (_from_list(lambda n: str(n[1])), _of_list("Second"), 1),
        "last": (_from_list(lambda n: str(n[-1])), _of_list("Last"), 1),
        "length": (_from_list(lambda n: str(len(n)), 2, 7), ("Length of {items}.", "How long is {items}?"), 0.8),
        "max": (_from_list(lambda n: str(max(n))), _of_list("Largest"), 1.4),
        "min": (_from_list(lambda n: str(min(n))), _of_list("Smallest"), 1.6),
    },
) + many(
    "lists",
    False,
    {
        "last_first": (_from_list(lambda n: f"{n[-1]},{n[0]}"), _of_list("Last and first"), 1),
        "second_last": (_from_list(lambda n: f"{n[1]},{n[-1]}"), _of_list("Second and last"), 1),
        "max_min": (_from_list(lambda n: f"{max(n)},{min(n)}"), _of_list("Largest and smallest"), 1),
        "length_last": (
            _from_list(lambda n: f"{len(n)},{n[-1]}", 2, 7),
            ("Length and last number of {items}.", "How long is {items}? What is the last number?"),
            1,
        ),
    },
)


def _unit_pair(rng: Random, kind: str | None = None) -> tuple[str, str, int]:
    """Draw (larger unit, smaller unit, factor), of one kind or of any."""
    kinds = [kind] if kind else list(UNIT_PAIRS)
    return rng.choice([pair for k in kinds for pair in UNIT_PAIRS[k]])


def _into_smaller(kind: str) -> Draw:
    def draw(rng: Random) -> tuple[Fields, str]:
        large, small, factor = _unit_pair(rng, kind)
        n = rng.randint(2, 99)
        return {"n": n, "from": large, "to": small}, str(n * factor)

    return draw


def _into_larger(rng: Random) -> tuple[Fields, str]:
    large, small, factor = _unit_pair(rng)
    n = rng.randint(2, 99)
    return {"n": n * factor, "from": small, "to": large}, str(n)


def _two_amounts(rng: Random) -> tuple[Fields, str]:
    large, small, factor = _unit_pair(rng)
    n, m = rng.randint(2, 99), rng.randint(2, 99)
    return {"n": n, "m": m, "from": large, "to": small}, f"{n * factor},{m * factor}"


def _two_units(rng: Random) -> tuple[Fields, str]:
    (large, small, factor), (large2, small2, factor2) = _unit_pair(rng), _unit_pair(rng)
    n, m = rng.randint(2, 99), rng.randint(2, 99)
    fields: Fields = {"n": n, "from": large, "to": small, "m": m, "from2": large2, "to2": small2}
    return fields, f"{n * factor},{m * factor2}"


def _both_ways(rng: Random) -> tuple[Fields, str]:
    (large, small, factor), (large2, small2, factor2) = _unit_pair(rng), _unit_pair(rng)
    n, m = rng.randint(2, 99), rng.randint(2, 99)
    fields: Fields = {"n": n * factor, "from": small, "to": large, "m": m, "from2": large2, "to2": small2}
    return fields, f"{n},{m * factor2}"


_CONVERT: Final = ("How many {to} are {n} {from}?", "{n} {from} in {to}.")
_CONVERT_TWO: Final = (
    "How many {to} are {n} {from}? How many {to2} are {m} {from2}?",
    "{n} {from} in {to}. {m} {from2} in {to2}.",
)

_UNITS: Final = many(
    "units",
    True,
    {
        "length": (_into_smaller("length"), _CONVERT, 1),
        "mass": (_into_smaller("mass"), _CONVERT, 0.8),
        "volume": (_into_smaller("volume"), _CONVERT, 0.8),
        "back": (_into_larger, _CONVERT, 1.4),
    },
) + many(
    "units",
    False,
    {
        "two_amounts": (
            _two_amounts,
            ("How many {to} are {n} {from} and {m} {from}?", "{n} and {m} {from} in {to}."),
            1,
        ),
        "two_units": (_two_units, _CONVERT_TWO, 1),
        "both_ways": (_both_ways, _CONVERT_TWO, 1),
    },
)

NUMBER_OPS: Final[tuple[Op, ...]] = _ARITH + _COMPARE + _LISTS + _UNITS
"""All ops of the domains arith, compare, lists and units."""
