"""Two faults of typer 0.20, which flwr pins, with today's click; to be dropped once typer can be newer."""

from __future__ import annotations

from typing import Any

import click
import typer.core
import typer.main

__all__ = ["mend_typer"]


class _Argument(typer.core.TyperArgument):
    """An argument that keeps its help: click 8.4 has a field of that name, clears it, and has a section of its own."""

    def __init__(self, *, help: str | None = None, **options: Any) -> None:
        super().__init__(help=help, **options)
        self._text = help or ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:  # type: ignore[override]
        """Name and help, as typer's own section shows them."""
        return None if self.hidden else (self.make_metavar(ctx), self._text)


def mend_typer() -> None:
    """Show the help of arguments, and do not escape "[default: 0]" for a renderer that is off."""
    typer.core.HAS_RICH = False
    typer.main.TyperArgument = _Argument  # type: ignore[attr-defined]
