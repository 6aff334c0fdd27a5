"""What the command line says about itself: help, one-line summaries, and calls that it cannot read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import click

__all__ = ["explain_usage", "help_of", "summary_of"]

_EXAMPLE = re.compile(r"^Example: (.+)$", re.MULTILINE)
_UNWRAPPED = "\b\n"  # click leaves a paragraph that begins so as it stands


def help_of(command: Callable[..., Any]) -> str:
    """The help of a command: its docstring, the example on one line so that it can be copied."""
    return _EXAMPLE.sub(lambda m: f"{_UNWRAPPED}{m[0]}", _text(command))


def summary_of(command: Callable[..., Any]) -> str:
    """One line for the list of commands: the docstring's first sentence up to a colon."""
    return " ".join(_text(command).split("\n\n")[0].split()).partition(": ")[0].rstrip(".") + "."


def _text(command: Callable[..., Any]) -> str:
    """The docstring, its example joined where the source breaks it."""
    *parts, example = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join([*parts, " ".join(example.split())])


def explain_usage(error: click.ClickException) -> str:
    """What is wrong with a call, and how the command is called."""
    lines = [_problem(error)]
    context = getattr(error, "ctx", None)
    if context is not None:
        lines.append(context.get_usage().replace("Usage:", "usage:", 1))
        example = _EXAMPLE.search(context.command.help or "")
        if example:
            lines.append(f"example: {example[1]}")
        lines.append(f"help: {context.command_path} --help")
    return "\n  ".join(lines)


def _problem(error: click.ClickException) -> str:
    parameter = getattr(error, "param", None)
    if isinstance(error, click.MissingParameter) and parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.human_readable_name
        _, meaning = parameter.get_help_record(error.ctx) or ("", "")
        return f"{name} is missing: {meaning.replace('[required]', '').strip().rstrip('.')}"
    near = getattr(error, "possibilities", None)
    text = (error.message if near else error.format_message()).rstrip(".")
    if near:
        text += f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return text[:1].lower() + text[1:]
