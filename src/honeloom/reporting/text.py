"""How the page writes values: short numbers, clipped text, invisible characters made visible."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

__all__ = ["NAME", "alike", "clip", "code", "name", "number", "plural", "seconds", "size", "visible"]

NAME = 80
"""Characters of a name that a chart or a sentence shows."""
CELL = 240
CODE = 200_000
_STEER = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """Spell out control characters and marks that turn the reading direction, so that no name can pose as another."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"\\u{ord(c):04x}" if c in _STEER or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") else c
        for c in text
    )


def clip(value: Any, limit: int = CELL) -> str:
    """Text of at most `limit` characters; what is cut is counted."""
    text = str(value)
    if len(text) > limit:
        return f"{visible(text[:limit])}… ({len(text):,} characters)"
    return visible(text)


def code(text: str) -> str:
    """A whole file for a `<pre>`, cut where a browser would suffer."""
    return clip(text, CODE)


def number(value: Any) -> str:
    """A value for a table: four significant digits, thousands separated, None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value += 0.0  # no minus before 0
        return f"{value:.4g}".replace("-", "−") if abs(value) < 9999.5 else f"{value:,.0f}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else clip(value)


def alike(*values: float) -> list[str]:
    """Numbers that are read together, with the decimals that give the largest four digits."""
    largest = max((abs(v) for v in values), default=0.0)
    decimals = min(8, max(0, 3 - math.floor(math.log10(largest)))) if largest > 0 else 1
    return [f"{v:,.{decimals}f}".replace("-", "−") for v in values]


def name(value: Any) -> str:
    """A name within a sentence: in quotes, for many are ordinary words."""
    return f"“{clip(value, NAME)}”"


def seconds(value: float) -> str:
    """A duration as people say it."""
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: float) -> str:
    """A number of bytes in binary units."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 999.5 and unit != "bytes" else f"{value:,.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def plural(count: int, noun: str) -> str:
    """`1 row`, `2,352 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
