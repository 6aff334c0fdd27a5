"""Methods from other packages, found by entry points.

A package adds a method with an entry point in the group `honeloom.<kind>` (for example
`honeloom.merging`) whose object is a `honeloom.registry.Method`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import metadata

from honeloom.registry import Method

__all__ = ["discover"]


def discover(kind: str) -> Iterator[Method]:
    """Yield the rows of every plug-in of a kind, by name; one that fails to import is named and left out."""
    for point in sorted(metadata.entry_points(group=f"honeloom.{kind}"), key=lambda p: p.name):
        try:
            row = point.load()
        except Exception as error:  # a stranger's code may raise anything; it must not hide the others
            warnings.warn(f"plug-in {point.name!r} ({point.value}) did not load: {error!r}", stacklevel=2)
            continue
        yield row
