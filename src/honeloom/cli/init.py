"""`honeloom init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honeloom.cli.shared import print_json
from honeloom.errors import OutputExistsError
from honeloom.registry import load_target


def init(
    path: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="File to write.")] = Path("recipe.yaml"),
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe instead.")] = False,
) -> None:
    """Write a commented recipe, and beside it its JSON Schema for editors.

    Example: honeloom init my-recipe.yaml
    """
    if schema:
        print_json(load_target("honeloom.config.recipe:recipe_schema")())
        return
    schema_path = path.with_suffix(".schema.json")
    for existing in (path, schema_path):
        if existing.exists():
            raise OutputExistsError(f"{existing} exists; name another file: honeloom init NAME.yaml")
    text = (Path(__file__).parent / "recipe_template.yaml").read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes = load_target("honeloom.runs.atomic:write_bytes")
    load_target("honeloom.runs.atomic:write_json")(schema_path, load_target("honeloom.config.recipe:recipe_schema")())
    write_bytes(path, text.replace("SCHEMA_FILE", schema_path.name).encode())
    typer.echo(f"wrote {path} and {schema_path}; next: honeloom run {path} --output-dir out --dry-run", err=True)
    typer.echo(path)
