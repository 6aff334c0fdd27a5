"""Methods from other packages, found by entry points.

A package adds a method with an entry point in the group `honeloom.<kind>` (for example
`honeloom.merging`) whose object is a `honeloom.registry.Method`.
"""

from __future__ import annotations

import warnings
from importlib import metadata

from honeloom.registry import Method, Registry

__all__ = ["add_plugins"]


def add_plugins(registry: Registry) -> None:
    """Add the rows of every plug-in of a registry's kind, by name.

    One that fails to import, is no `Method` or takes a name that is taken is named in a
    warning and left out, so that it can neither replace a method nor hide the others.
    """
    for point in sorted(metadata.entry_points(group=f"honeloom.{registry.kind}"), key=lambda p: p.name):
        try:
            row = point.load()
            if not isinstance(row, Method):
                raise TypeError(f"it is a {type(row).__name__}, not a honeloom.registry.Method")
            registry.add(row)
        except Exception as error:  # a stranger's code may raise anything
            warnings.warn(f"plug-in {point.name!r} ({point.value}) was left out: {error!r}", stacklevel=3)
