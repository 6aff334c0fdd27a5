"""Names to lazily imported targets: the one boundary where heavy code is loaded.

A family (selection, merging, ...) keeps a `METHODS` table of `Method` rows beside its methods.
Rows are strings, so `honeloom methods` prints names, papers and versions without importing
torch; `Registry.load` imports the target on first use. Plug-ins add rows through the entry
point group of the family and may not shadow a built-in name.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from honeloom.errors import HoneloomError, MissingExtraError, UnknownNameError

__all__ = ["FAMILIES", "Method", "Registry", "family", "load_target", "suggest"]

FAMILIES: dict[str, str] = {
    "selection": "honeloom.selection",
    "valuation": "honeloom.valuation",
    "tuning": "honeloom.tuning",
    "optimizers": "honeloom.tuning.optimizers",
    "rates": "honeloom.federated.rate_methods",
    "aggregation": "honeloom.federated",
    "merging": "honeloom.merging",
    "search": "honeloom.merging.search",
    "routing": "honeloom.mixture",
    "dropping": "honeloom.dropping",
}
"""Kind of method -> the package whose `METHODS` table lists it."""


EXTRAS = {"peft": "tune", "accelerate": "tune", "datasets": "tune", "lm_eval": "lm-eval", "bitsandbytes": "quant"}
"""Module -> the extra that brings it, for what is imported on the way to a target."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row of a family's table.

    Attributes
    ----------
    name : str
        What the user writes as `type`.
    target : str
        "module:function" of the pure method.
    config : str
        "module:Class" of its frozen settings.
    paper : str
        Citation with its arXiv number or venue, or "folklore" for baselines.
    version : int
        Raised whenever the method's numbers change; part of every stage key.
    summary : str
        One line for `honeloom methods`.
    """

    name: str
    target: str
    config: str
    paper: str
    summary: str
    version: int = 1


def load_target(target: str) -> Any:
    """Import "module:attribute" and return the attribute.

    Raises
    ------
    MissingExtraError
        Something that it imports belongs to an extra that is not installed.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise HoneloomError(f"{target!r}: module {module} has no {attribute!r}") from error
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        if absent not in EXTRAS:
            raise
        raise MissingExtraError(
            f"{absent} is not installed: pip install 'honeloom[{EXTRAS[absent]}]'; `honeloom doctor` lists what every "
            "extra adds"
        ) from None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a near miss, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


class Registry:
    """The methods of one kind, by name.

    Parameters
    ----------
    kind : str
        Used in messages and as the entry point group `honeloom.<kind>`.
    rows : iterable of Method
        Built-in methods; a repeated name raises.
    """

    def __init__(self, kind: str, rows: Iterable[Method] = ()) -> None:
        self.kind = kind
        self._rows: dict[str, Method] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Method) -> None:
        """Add one row; a name that is taken raises HoneloomError."""
        if row.name in self._rows:
            raise HoneloomError(
                f"{self.kind} method {row.name!r} exists already ({self._rows[row.name].target}); "
                f"choose another name, for example 'mine/{row.name}'"
            )
        self._rows[row.name] = row

    def __iter__(self) -> Iterator[Method]:
        return iter(self._rows.values())

    def names(self) -> list[str]:
        """Known names in table order."""
        return list(self._rows)

    def get(self, name: str) -> Method:
        """Return the row called `name`, or raise UnknownNameError with a suggestion."""
        if name not in self._rows:
            raise UnknownNameError(
                f"unknown {self.kind} method {name!r}{suggest(name, self._rows)} (known: {', '.join(self._rows)})"
            )
        return self._rows[name]

    def load(self, name: str) -> Any:
        """Import and return the function behind `name`."""
        return load_target(self.get(name).target)

    def load_config(self, name: str) -> Any:
        """Import and return the settings class behind `name`."""
        return load_target(self.get(name).config)


@cache
def family(kind: str) -> Registry:
    """Return the registry of a family with its plug-ins."""
    if kind not in FAMILIES:
        raise UnknownNameError(f"unknown kind {kind!r}{suggest(kind, FAMILIES)} (known: {', '.join(FAMILIES)})")
    registry = Registry(kind, importlib.import_module(FAMILIES[kind]).METHODS)
    load_target("honeloom.plugins:add_plugins")(registry)
    return registry
