"""`honeloom rows preview` and `honeloom rows convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honeloom.cli import options as o
from honeloom.cli.help import help_of, summary_of
from honeloom.cli.shared import print_json, terminal
from honeloom.registry import load_target

rows = typer.Typer(help="Look at rows, and convert between formats.", no_args_is_help=True, rich_markup_mode=None)


def preview(
    sources: Annotated[list[str], typer.Argument(metavar="ROWS...", help="Path, glob, hub id or lab:pool|dev|test.")],
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", help="The model whose tokenizer and chat template render the rows."),
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Rows to print.")] = 5,
    limit: o.Limit = None,
    max_length: o.MaxLength = None,
    json: o.Json = False,
) -> None:
    """Show what is trained (green) and what is masked (dim), and fail if the turn end is never a label.

    Example: honeloom rows preview rows.jsonl --model org/model
    """
    console = terminal(json)
    result = load_target("honeloom.stages.rows:preview")(
        sources, model, count=count, limit=limit, max_length=max_length
    )
    if json:
        print_json(result)
        return
    load_target("honeloom.cli.preview:print_preview")(result, console)


def convert(
    sources: Annotated[list[str], typer.Argument(metavar="ROWS...", help="Path, glob, hub id or lab:pool|dev|test.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .jsonl, .jsonl.gz or .parquet.")],
    to: Annotated[
        str, typer.Option("--to", metavar="messages|alpaca|sharegpt|prompt-completion", help="Format to write.")
    ] = "messages",
    limit: o.Limit = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Read rows of any known format and write them in another.

    Example: honeloom rows convert alpaca.json rows.jsonl --to messages
    """
    console = terminal(False)
    written, rejected = load_target("honeloom.stages.rows:convert")(
        sources, out, to=to, limit=limit, overwrite=overwrite
    )
    for bad in rejected[:5]:
        console.warn(f"{bad.where}: {bad.reason}")
    console.say(f"{written} rows written, {len(rejected)} rejected")
    typer.echo(out)


for _command in (preview, convert):
    rows.command(help=help_of(_command), short_help=summary_of(_command))(_command)
