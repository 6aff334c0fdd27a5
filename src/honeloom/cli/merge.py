"""`honeloom merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, run_verb, settings
from honeloom.registry import load_target


def merge(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: models, method, base_model; or mergekit's.")],
    out: o.OutArgument = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Every random choice follows from it.  [default: 0]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where to check the result.  [default: auto]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="auto|bf16|fp16|fp32", help="Type of the output.  [default: the donor's]"),
    ] = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
) -> None:
    """Merge models of one architecture into one.

    Example: honeloom merge merge.yaml merged
    """
    data: dict[str, Any] = load_target("honeloom.config.load:load_yaml")(config)
    given = {**data, **settings("merge", {"seed": seed, "device": device, "dtype": dtype}, None)}
    if set_:
        given = load_target("honeloom.config.load:apply_overrides")(given, set_)

    def call(output_dir: Path | None, **options: Any) -> Any:
        return honeloom.merge(config, output_dir=output_dir, **options)  # type: ignore[arg-type]

    run_verb("merge", call, given, out=choose_out(out, output_dir), overwrite=overwrite, resume=resume,
             as_json=json, dry_run=dry_run, push_to_hub=push_to_hub)  # fmt: skip
