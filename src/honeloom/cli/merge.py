"""`honeloom merge`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import honeloom
from honeloom.cli import options as o
from honeloom.cli.shared import choose_out, print_plans, run_verb, settings, terminal
from honeloom.errors import ConfigError
from honeloom.registry import load_target


def merge(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="YAML: models or slices, method, base_model; or mergekit's."),
    ] = None,
    out: o.OutArgument = None,
    from_card: Annotated[
        Path | None,
        typer.Option("--from-card", metavar="README", help="Instead of CONFIG: make the model of a card again."),
    ] = None,
    seed: o.SettledSeed = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="auto|bf16|fp16|fp32", help="Type of the output.  [default: the donor's]"),
    ] = None,
    max_memory: o.MaxMemory = None,
    threads: o.Threads = None,
    device: o.SettledDevice = None,
    set_: o.Set = None,
    output_dir: o.OutputDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    push_to_hub: o.PushToHub = None,
    json: o.Json = False,
    dry_run: o.DryRun = False,
    calibrate: o.Calibrate = False,
) -> None:
    """Merge models of one architecture into one.

    Example: honeloom merge merge.yaml merged
    """
    if from_card is not None and config is not None and out is None:
        config, out = None, config  # with a card there is one argument: OUT
    target = choose_out(out, output_dir)
    documents, call = _read(config, from_card, target)
    if dry_run and len(documents) > 1:
        print_plans(honeloom.plan("merge", output_dir=target, config=config, calibrate=calibrate), terminal(json), json)
        return
    flags = {"seed": seed, "device": device, "dtype": dtype, "max_memory": max_memory, "threads": threads}
    given = {**documents[-1], **settings("merge", flags, None)}
    if set_:
        given = load_target("honeloom.config.load:apply_overrides")(given, set_)
    run_verb("merge", call, given, out=target, overwrite=overwrite, resume=resume,
             as_json=json, dry_run=dry_run, calibrate=calibrate, push_to_hub=push_to_hub)  # fmt: skip


def _read(config: Path | None, card: Path | None, out: Path | None) -> tuple[list[dict[str, Any]], Callable[..., Any]]:
    """The documents of a merge, the result's last, and the function that merges it."""
    if card is not None:
        document, _ = load_target("honeloom.merging.documents:read_card")(card)
        return [document], partial(honeloom.merge, from_card=card)
    if config is None:
        raise ConfigError("merge needs a configuration, or --from-card with the card of a merged model")
    documents = load_target("honeloom.config.load:load_documents")(config)
    ordered = load_target("honeloom.merging.documents:in_order")(documents, Path(f"{out or 'merged'}-parts"))
    return [document for _, document in ordered], partial(honeloom.merge, config)
