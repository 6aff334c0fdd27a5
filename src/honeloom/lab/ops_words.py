"""The four domains of the lab made of words: strings, logic, lookup, dates."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

from honeloom.lab.names import (
    CRAFT_OF,
    HOME_OF,
    LAND_OF,
    MONTHS,
    PEOPLE,
    RIVER_OF,
    TOOL_OF,
    TRAITS,
)
from honeloom.lab.ops import Draw, Fields, Op, many

__all__ = ["WORD_OPS", "plain_facts"]

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def _from_letters(rule: Callable[[str], str], fewest: int, most: int) -> Draw:
    """Draw a string of different letters and answer by ``rule``."""

    def draw(rng: Random) -> tuple[Fields, str]:
        text = "".join(rng.sample(_LETTERS, rng.randint(fewest, most)))
        return {"s": text}, rule(text)

    return draw


def _letter(phrase: str, ending: str = "") -> tuple[str, ...]:
    return (f"{phrase} letter of '{{s}}'{ending}.", f"What is the {phrase.lower()} letter of '{{s}}'{ending}?")


_STRINGS: Final = many(
    "strings",
    True,
    {
        "reverse": (_from_letters(lambda s: s[::-1], 3, 5), ("Reverse '{s}'.", "Write '{s}' backwards."), 1.4),
        "capitals": (_from_letters(str.upper, 3, 6), ("'{s}' in capitals.", "Write '{s}' in capitals."), 1),
        "first": (_from_letters(lambda s: s[0], 3, 6), _letter("First"), 0.7),
        "last": (_from_letters(lambda s: s[-1], 3, 6), _letter("Last"), 0.9),
    },
) + many(
    "strings",
    False,
    {
        "last_first": (_from_letters(lambda s: f"{s[-1]},{s[0]}", 3, 6), _letter("Last and first"), 1),
        "first_capital": (_from_letters(lambda s: s[0].upper(), 3, 6), _letter("First", " in capitals"), 1),
        "last_capital": (_from_letters(lambda s: s[-1].upper(), 3, 6), _letter("Last", " in capitals"), 1),
        "reverse_capitals": (
            _from_letters(lambda s: s[::-1].upper(), 3, 5),
            ("Reverse '{s}' in capitals.", "Write '{s}' backwards in capitals."),
            1,
        ),
    },
)


def _literal(rng: Random) -> tuple[str, bool]:
    value, negated = rng.random() < 0.5, rng.random() < 0.5
    return ("not " if negated else "") + ("true" if value else "false"), value != negated


def _expression(rng: Random, size: int) -> tuple[str, bool]:
    """Literals joined by and / or; ``and`` binds tighter, as in most languages."""
    text, value = _literal(rng)
    groups = [value]
    for _ in range(size - 1):
        word, more = _literal(rng)
        if rng.random() < 0.5:
            text, groups[-1] = f"{text} and {word}", groups[-1] and more
        else:
            text, groups = f"{text} or {word}", [*groups, more]
    return text, any(groups)


def _evaluate(size: int) -> Draw:
    def draw(rng: Random) -> tuple[Fields, str]:
        text, value = _expression(rng, size)
        return {"e": text}, str(value)

    return draw


def _literals(rng: Random, every: bool) -> tuple[str, bool, bool]:
    """Three or four literals as text, all of them true, any of them true; the asked answer is even."""
    wanted, size = rng.random() < 0.5, rng.randint(3, 4)
    while True:
        drawn = [_literal(rng) for _ in range(size)]
        values = [value for _, value in drawn]
        if (all(values) if every else any(values)) == wanted:
            return ", ".join(text for text, _ in drawn), all(values), any(values)


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


def _quantified(rng: Random) -> tuple[Fields, str]:
    every = rng.random() < 0.5
    text, all_true, any_true = _literals(rng, every)
    return {"how": "Are all" if every else "Is any", "items": text}, _yes(all_true if every else any_true)


def _ponens(rng: Random) -> tuple[Fields, str]:
    trait, then = rng.sample(TRAITS, 2)
    holds = rng.random() < 0.5
    fields = {"p": rng.choice(PEOPLE), "if": trait, "then": then, "no": "" if holds else "not "}
    return fields, _yes(holds)


def _two_values(rng: Random) -> tuple[Fields, str]:
    (e, value), (f, other) = _expression(rng, 2), _expression(rng, 2)
    return {"e": e, "f": f}, f"{value}, {other}"


def _values(rng: Random) -> tuple[Fields, str]:
    drawn = [_literal(rng) for _ in range(rng.randint(3, 4))]
    return {"items": ", ".join(text for text, _ in drawn)}, ", ".join(str(value) for _, value in drawn)


def _all_and_any(rng: Random) -> tuple[Fields, str]:
    text, all_true, any_true = _literals(rng, rng.random() < 0.5)
    return {"items": text}, f"{_yes(all_true)}, {_yes(any_true)}"


_VALUE: Final = ("What is {e}?", "Work out {e}.")

_LOGIC: Final = many(
    "logic",
    True,
    {
        "two": (_evaluate(2), _VALUE, 0.8),
        "three": (_evaluate(3), _VALUE, 1.2),
        "quantified": (_quantified, ("{how} of {items} true?",), 1),
        "ponens": (
            _ponens,
            (
                "If {p} is {if} then {p} is {no}{then}. {p} is {if}. Is {p} {then}?",
                "{p} is {if}. If {p} is {if} then {p} is {no}{then}. Is {p} {then}?",
            ),
            0.6,
        ),
    },
) + many(
    "logic",
    False,
    {
        "two_values": (_two_values, ("What is {e}? What is {f}?", "Work out {e}. Work out {f}."), 1),
        "values": (_values, ("What is {items}?", "Work out {items}."), 1),
        "all_and_any": (_all_and_any, ("Are all of {items} true? Is any of {items} true?",), 1),
    },
)

_FACT_KINDS: Final = {
    "home": (HOME_OF, "Home of {x}.", "Where does {x} live?"),
    "craft": (CRAFT_OF, "Craft of {x}.", "What is the craft of {x}?"),
    "land": (LAND_OF, "Land of {x}.", "In which land is {x}?"),
    "river": (RIVER_OF, "River of {x}.", "Which river runs through {x}?"),
    "tool": (TOOL_OF, "Tool of {x}.", "Which tool does a {x} use?"),
}
# People outnumber towns and crafts four to one, so their facts need the larger share of the text.
_FACT_SHARE: Final = {"home": 4, "craft": 4, "land": 1, "river": 1, "tool": 1}


def _fact(kind: str) -> Draw:
    table = _FACT_KINDS[kind][0]

    def draw(rng: Random) -> tuple[Fields, str]:
        name = rng.choice(list(table))
        return {"x": name}, table[name]

    return draw


def _of_person(*rules: Callable[[str], str]) -> Draw:
    """Draw a person and answer by every rule, in order."""

    def draw(rng: Random) -> tuple[Fields, str]:
        person = rng.choice(PEOPLE)
        return {"p": person}, ", ".join(rule(person) for rule in rules)

    return draw


def _land(person: str) -> str:
    return LAND_OF[HOME_OF[person]]


def _river(person: str) -> str:
    return RIVER_OF[HOME_OF[person]]


def _tool(person: str) -> str:
    return TOOL_OF[CRAFT_OF[person]]


def _asked(phrase: str) -> tuple[str, ...]:
    return (f"{phrase} of {{p}}.", f"What is the {phrase.lower()} of {{p}}?", f"{phrase} for {{p}}?")


_FACTS: Final = tuple(
    Op(f"lookup.{kind}", _fact(kind), tuple(texts), weight=0.2 * _FACT_SHARE[kind], everywhere=True)
    for kind, (_, *texts) in _FACT_KINDS.items()
)
_HOPS: Final = {
    "land_of": (_of_person(_land), ("In which land does {p} live?", *_asked("Land")), 1.0),
    "river_of": (_of_person(_river), ("Which river runs through the home of {p}?", *_asked("River")), 1.0),
    "tool_of": (_of_person(_tool), ("Which tool does {p} use?", *_asked("Tool")), 1.0),
    "home_land": (_of_person(HOME_OF.__getitem__, _land), _asked("Home and land"), 1.0),
}
_LOOKUP: Final = (
    _FACTS
    + many("lookup", True, _HOPS)
    + many(
        "lookup",
        False,
        {
            "home_craft": (_of_person(HOME_OF.__getitem__, CRAFT_OF.__getitem__), _asked("Home and craft"), 1),
            "craft_land": (_of_person(CRAFT_OF.__getitem__, _land), _asked("Craft and land"), 1),
            "craft_tool": (_of_person(CRAFT_OF.__getitem__, _tool), _asked("Craft and tool"), 1),
            "land_river": (_of_person(_land, _river), _asked("Land and river"), 1),
        },
    )
)


def _beside(step: int) -> Draw:
    """Draw a day well inside its month and answer with the day before (-1) or after (+1)."""

    def draw(rng: Random) -> tuple[Fields, str]:
        day, month = rng.randint(2, 27), rng.choice(MONTHS)
        return {"d": day, "m": month}, f"{day + step} {month}"

    return draw


def _which_month(later: bool) -> Draw:
    def draw(rng: Random) -> tuple[Fields, str]:
        first, second = rng.sample(range(12), 2)
        answer = max(first, second) if later else min(first, second)
        return {"m": MONTHS[first], "k": MONTHS[second]}, MONTHS[answer]

    return draw


def _around(rng: Random) -> tuple[Fields, str]:
    day, month = rng.randint(2, 27), rng.choice(MONTHS)
    return {"d": day, "m": month}, f"{day - 1} {month},{day + 1} {month}"


def _two_days(first: int, second: int) -> Draw:
    def draw(rng: Random) -> tuple[Fields, str]:
        day, other = rng.randint(2, 27), rng.randint(2, 27)
        month, month2 = rng.sample(MONTHS, 2)
        fields: Fields = {"d": day, "m": month, "e": other, "k": month2}
        return fields, f"{day + first} {month},{other + second} {month2}"

    return draw


def _months_in_order(rng: Random) -> tuple[Fields, str]:
    first, second = rng.sample(range(12), 2)
    early, late = sorted((first, second))
    return {"m": MONTHS[first], "k": MONTHS[second]}, f"{MONTHS[early]}, {MONTHS[late]}"


_DATES: Final = many(
    "dates",
    True,
    {
        "next": (_beside(1), ("Which day comes after {d} {m}?", "The day after {d} {m}."), 1),
        "previous": (_beside(-1), ("Which day comes before {d} {m}?", "The day before {d} {m}."), 1),
        "earlier": (_which_month(False), ("Which comes earlier, {m} or {k}?", "Earlier of {m} and {k}."), 1),
        "later": (_which_month(True), ("Which comes later, {m} or {k}?", "Later of {m} and {k}."), 1),
    },
) + many(
    "dates",
    False,
    {
        "around": (_around, ("Which day comes before and after {d} {m}?", "The day before and after {d} {m}."), 1),
        "two_next": (
            _two_days(1, 1),
            ("Which day comes after {d} {m} and {e} {k}?", "The day after {d} {m}. The day after {e} {k}."),
            1,
        ),
        "cross": (
            _two_days(-1, 1),
            (
                "Which day comes before {d} {m}? Which day comes after {e} {k}?",
                "The day before {d} {m}. The day after {e} {k}.",
            ),
            1,
        ),
        "order": (
            _months_in_order,
            ("Which comes earlier and later, {m} or {k}?", "Earlier and later of {m} and {k}."),
            1,
        ),
    },
)


def plain_facts() -> tuple[str, ...]:
    """Return every fact of the knowledge base as a plain sentence."""
    return (
        *(f"{person} lives in {town}." for person, town in HOME_OF.items()),
        *(f"{person} works as {craft}." for person, craft in CRAFT_OF.items()),
        *(f"{town} lies in {land}." for town, land in LAND_OF.items()),
        *(f"The river of {town} is {river}." for town, river in RIVER_OF.items()),
        *(f"The tool of a {craft} is {tool}." for craft, tool in TOOL_OF.items()),
    )


WORD_OPS: Final[tuple[Op, ...]] = _STRINGS + _LOGIC + _LOOKUP + _DATES
"""All ops of the domains strings, logic, lookup and dates."""
