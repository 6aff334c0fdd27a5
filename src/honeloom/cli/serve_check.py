"""`honeloom serve-check`."""

from __future__ import annotations

from typing import Annotated

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import print_json, terminal
from honeloom.registry import load_target
from honeloom.types.views import text_table


def serve_check(
    target: Annotated[str, typer.Argument(metavar="OUT|MODEL", help="What export wrote, a .gguf file, or a model.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="SOURCE", help="The source.  [default: what OUT was exported from]"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            metavar="llama.cpp|transformers",
            help="Where it runs.  [default: llama.cpp for GGUF, transformers for a folder]",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Written after each prompt.")] = 24,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Run an exported model against its source; exits with 3 if they differ.

    Three prompts are continued greedily in the runtime and in the source. Where they part, the source's own margin
    between both tokens says whether rounding explains it.

    Example: honeloom serve-check served
    """
    console = terminal(json)
    report = honeloom.serve_check(target, against=against, runtime=runtime, tokens=tokens, device=device)  # type: ignore[arg-type]
    if json:
        print_json(report.to_json())
    else:
        console.say(text_table(*load_target("honeloom.stages.serve_check:table")(report)))
        console.show_report(report)
        typer.echo(target)
    if report.status != "ok":
        raise typer.Exit(3)
