"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from honeloom.errors import UnknownNameError
from honeloom.registry import suggest

__all__ = ["shipped_names", "shipped_path"]

_FOLDER = Path(__file__).parents[1] / "recipes"


def shipped_names() -> list[str]:
    """Names of all of them, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def shipped_path(name: str) -> Path:
    """File of one of them; UnknownNameError lists the names."""
    names = shipped_names()
    if name not in names:
        raise UnknownNameError(f"no shipped recipe {name!r}{suggest(name, names)} (known: {', '.join(names)})")
    return _FOLDER / f"{name}.yaml"
