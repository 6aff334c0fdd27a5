"""`honeloom recipes ls` and `honeloom recipes cp`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honeloom.cli.help import help_of, summary_of
from honeloom.config.shipped import shipped_names, shipped_path
from honeloom.errors import OutputExistsError
from honeloom.registry import load_target

recipes = typer.Typer(help="Recipes that come with honeloom.", no_args_is_help=True, rich_markup_mode=None)


def ls() -> None:
    """Print the names of the shipped recipes, one a line.

    Example: honeloom recipes ls
    """
    for name in shipped_names():
        typer.echo(name)


def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One that `recipes ls` prints.")],
    to: Annotated[
        Path | None, typer.Argument(metavar="[TO]", help="File, or a folder for it.  [default: NAME.yaml here]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a shipped recipe, to be read, changed and run.

    Example: honeloom recipes cp whole-loop my-loop.yaml
    """
    source = shipped_path(name)
    target = to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} exists; name another file, or pass --overwrite to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    load_target("honeloom.runs.atomic:write_bytes")(target, source.read_bytes())
    typer.echo(f"next: honeloom run {target} --output-dir out --dry-run", err=True)
    typer.echo(target)


for command in (ls, cp):
    recipes.command(help=help_of(command), short_help=summary_of(command))(command)
