"""From flags to a verb and from its report to the terminal."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import honeloom
from honeloom.errors import ConfigError
from honeloom.flags import place_flags
from honeloom.registry import load_target
from honeloom.runs.processes import rank
from honeloom.runs.redact import redact_tree
from honeloom.verbs import VERBS

if TYPE_CHECKING:
    from honeloom.types.report import Report
    from honeloom.types.views import PlanList

__all__ = ["choose_out", "print_json", "run_verb", "settings", "terminal"]


def terminal(as_json: bool) -> Any:
    """The console for a person: stdout, or stderr when stdout carries JSON; libraries are kept quiet."""
    _quiet_libraries()
    return load_target("honeloom.cli.terminal:Terminal")(as_json)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout, secrets blanked."""
    sys.stdout.write(json.dumps(redact_tree(document), indent=2, ensure_ascii=False) + "\n")


def choose_out(argument: Path | None, option: Path | None) -> Path | None:
    """The output folder, given by position or by --output-dir; both is an error."""
    if argument is not None and option is not None:
        raise ConfigError(f"OUT is given twice: {argument} and --output-dir {option}; give it once")
    return argument or option


def settings(verb: str, given: dict[str, Any], overrides: Sequence[str] | None) -> dict[str, Any]:
    """Settings from the flags that were given (not None, not an empty list), with --set applied on top."""
    result = place_flags(verb, {k: v for k, v in given.items() if v != []})
    if not overrides:
        return result
    applied: dict[str, Any] = load_target("honeloom.config.load:apply_overrides")(result, overrides)
    return applied


def run_verb(
    verb: str,
    call: Callable[..., Report],
    options: dict[str, Any],
    *,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    as_json: bool,
    dry_run: bool,
    push_to_hub: str | None = None,
    calibrate: bool = False,
) -> None:
    """Plan or run a verb and print the result as the contract says.

    Parameters
    ----------
    verb : str
        Its name, for the plan.
    call : callable
        The verb's function, taking output_dir, overwrite, resume, console and the options.
    options : dict
        Its settings.
    out : Path or None
        The output folder.
    push_to_hub : str or None
        Repository that the result goes to; only for verbs whose function takes it.
    calibrate : bool
        Whether the plan also times a few steps.
    """
    console = terminal(as_json)
    if verb in VERBS:  # before a key such as "resume" meets a parameter of that name
        load_target("honeloom.config.base:validate")(load_target(VERBS[verb].config), options, what=verb)
    if push_to_hub is not None:
        options = {**options, "push_to_hub": push_to_hub}
    if calibrate and not dry_run:
        raise ConfigError("--calibrate belongs to the plan: add --dry-run, or leave it out")
    if dry_run:
        if push_to_hub is not None:
            load_target("honeloom.stages.publish:check_repository")(push_to_hub)
        if rank() == 0:  # the others would only say the same
            plans = honeloom.plan(verb, output_dir=out, calibrate=calibrate, console=console, **options)
            print_plans(plans, console, as_json)
        return
    report = call(output_dir=out, overwrite=overwrite, resume=resume, console=console, **options)
    if rank() > 0:
        return  # the leading process speaks
    if as_json:
        print_json(report.to_json())
        return
    console.show_report(report)
    if out is not None:
        if (out / "report.html").is_file():
            console.say(f"report: {out / 'report.html'}")
        sys.stdout.write(f"{os.path.realpath(out)}\n")  # not the report's: a reused folder may have been moved


def _quiet_libraries() -> None:
    """Keep libraries from talking over the command; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def print_plans(plans: PlanList, console: Any, as_json: bool) -> None:
    """Print what would be done."""
    if as_json:
        document = {"schema": "honeloom.plan/1", "stages": [p.to_json() for p in plans], "total": plans.total}
        print_json(document)
    else:
        console.show_plans(plans)
