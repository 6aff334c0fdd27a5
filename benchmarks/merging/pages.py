"""What the pages of this folder share: tables, the machine, and whether the goals are reached."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Goal(NamedTuple):
    """A claim with its limit, what was measured, and whether it holds."""

    claim: str
    found: str
    reached: bool


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def machine(theirs: Mapping[str, str]) -> str:
    """The machine, and the versions on both sides."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ours = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy"))
    rival = ", ".join(f"{name} {number}" for name, number in theirs.items())
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}. "
        f"honeloom {version('honeloom')} with {ours}; {rival}."
    )


def goals(found: Sequence[Goal]) -> list[str]:
    """The goals as a table, and by name those not reached."""
    rows = [(g.claim, g.found, "yes" if g.reached else "no") for g in found]
    missed = [f"- {g.claim}: {g.found}." for g in found if not g.reached]
    return [*table(("goal", "measured", "reached"), rows), "", "## Not reached", "", *(missed or ["Nothing."]), ""]


def write(name: str, lines: Iterable[str]) -> None:
    """Write a page of this folder, and show it."""
    text = "\n".join(lines)
    (HERE / name).write_text(text)
    print(text)
