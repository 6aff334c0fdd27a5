"""The `honeloom` command: assembles the verbs and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import traceback

import click
import typer

from honeloom import __version__
from honeloom.cli.aggregate import aggregate
from honeloom.cli.convert import convert
from honeloom.cli.demo import demo
from honeloom.cli.doctor import doctor
from honeloom.cli.drop import drop
from honeloom.cli.evaluate import evaluate
from honeloom.cli.export import export
from honeloom.cli.extract_lora import extract_lora
from honeloom.cli.federate import federate
from honeloom.cli.glue import glue
from honeloom.cli.help import explain_usage, help_of, summary_of
from honeloom.cli.init import init
from honeloom.cli.lineage import lineage
from honeloom.cli.merge import merge
from honeloom.cli.methods import methods
from honeloom.cli.mix import mix
from honeloom.cli.recipes import recipes
from honeloom.cli.report import report
from honeloom.cli.rows import rows
from honeloom.cli.run import run
from honeloom.cli.select import select
from honeloom.cli.serve_check import serve_check
from honeloom.cli.tune import tune
from honeloom.cli.typer_fixes import mend_typer
from honeloom.cli.verify import verify
from honeloom.errors import HoneloomError
from honeloom.runs.redact import redact
from honeloom.runs.signals import Terminated, terminate_cleanly

__all__ = ["app", "main"]

mend_typer()
app = typer.Typer(
    name="honeloom",
    help="Adapt open language models: choose rows, tune, federate, merge, mix, drop layers, and prove every step.",
    no_args_is_help=True,
    rich_markup_mode=None,
    suggest_commands=False,  # click suggests already
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_COMMANDS = (
    demo, init, run, select, tune, aggregate, federate, merge, mix, glue, extract_lora, convert, drop, export,
    serve_check, evaluate, verify, report, lineage, methods, doctor,
)  # fmt: skip
for command in _COMMANDS:
    app.command(help=help_of(command), short_help=summary_of(command))(command)
app.add_typer(rows, name="rows")
app.add_typer(recipes, name="recipes")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Adapt open language models: choose rows, tune, federate, merge, mix, drop layers, and prove every step."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 failed, 2 bad input, 3 verification failed, 130 and 143 interrupted."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    # OpenMP threads that spin while they wait make two busy processes many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with terminate_cleanly():
            result = app(args=arguments, prog_name="honeloom", standalone_mode=False)
        if result == 130:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except HoneloomError as error:
        return _fail(str(error), error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail("interrupted; run the same command again to go on from here", 130)
    except Terminated:
        return _fail("terminated; run the same command again to go on from here", 143)
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()  # the help itself
            return error.exit_code
        return _fail(explain_usage(error), error.exit_code)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except Exception:
        return _fail(f"unexpected error, please report it:\n{traceback.format_exc()}", 1)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {redact(message)}", file=sys.stderr)
    return code
