"""`honeloom methods`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from honeloom.cli import options as o
from honeloom.cli.shared import print_json
from honeloom.registry import FAMILIES, family


def methods(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help=f"One of {', '.join(FAMILIES)}.  [default: all]")
    ] = None,
    json: o.Json = False,
) -> None:
    """List every method: name, version, defaults, paper.

    Example: honeloom methods merging
    """
    table = {k: [_describe(k, name) for name in family(k).names()] for k in ([kind] if kind else FAMILIES)}
    if json:
        print_json(table)
        return
    for k, entries in table.items():
        typer.echo(f"{k}:")
        for entry in entries:
            defaults = ", ".join(f"{n}={v}" for n, v in entry["defaults"].items()) or "no settings"
            typer.echo(f"  {entry['name']} (v{entry['version']}): {entry['summary']}")
            typer.echo(f"      {defaults}; {entry['paper']}")


def _describe(kind: str, name: str) -> dict[str, Any]:
    registry = family(kind)
    row = registry.get(name)
    fields = registry.load_config(name).model_fields
    defaults = {n: _default(info) for n, info in fields.items() if n != "type"}
    return {"name": name, "version": row.version, "summary": row.summary, "paper": row.paper, "defaults": defaults}


def _default(info: Any) -> Any:
    """A field's default as JSON; a field without one says so."""
    if info.is_required():
        return "(required)"
    value = info.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
