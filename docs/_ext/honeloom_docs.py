"""Directives that print what the code knows, so that no table of the documentation can drift.

``{method-table}`` lists every method, ``{method-card} KIND NAME`` one of them, ``{settings} MODULE:CLASS`` the
fields of a settings class, ``{command} NAME`` the help of a command, ``{paper-table}`` the papers of all methods.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import click
import typer.main
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from honeloom.cli.main import app as command_line
from honeloom.registry import FAMILIES, Method, family, load_target

_ARXIV = re.compile(r"(?:arXiv:)?(?<![\d./])(\d{4}\.\d{5})(?!\d)")
_DOI = re.compile(r"doi:(\S+)")
_VERB = {
    "selection": "select",
    "valuation": "valuation.estimate",
    "tuning": "tune",
    "optimizers": "tune, federate",
    "rates": "federate",
    "aggregation": "aggregate",
    "merging": "merge",
    "search": "glue",
    "routing": "mix, glue",
    "dropping": "drop",
}


def cite(paper: str) -> str:
    """Markdown of a citation, its arXiv number or DOI as a link."""
    linked = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return _DOI.sub(r"[doi:\1](https://doi.org/\1)", linked)


def builtin(kind: str) -> list[Method]:
    """The methods of a family that are part of honeloom."""
    return [m for m in family(kind) if m.target.startswith("honeloom.")]


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def value_kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """One JSON Schema in words: the values that a setting may have."""
    if "$ref" in schema:
        return "settings of a " + schema["$ref"].rsplit("/", 1)[-1]
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if "oneOf" in schema or "anyOf" in schema:
        parts = schema.get("oneOf") or schema["anyOf"]
        return " or ".join(dict.fromkeys(value_kind(p, definitions) for p in parts))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "list of " + ", ".join(value_kind(i, definitions) for i in schema["prefixItems"])
        return f"list of {value_kind(schema.get('items', {}), definitions)}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[k]}" for k, sign in signs.items() if k in schema and abs(schema[k]) < 2**60]
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return " ".join([names.get(schema.get("type", ""), schema.get("type", "any")), ", ".join(limits)]).strip()


def settings_table(target: str) -> str:
    """Every field of a settings class with what it may be, its default and its meaning."""
    schema = load_target(target).model_json_schema()
    definitions = schema.get("$defs", {})
    rows = []
    for name, entry in schema.get("properties", {}).items():
        if name == "type":
            continue
        default = "required" if name in schema.get("required", []) else f"`{_default(entry)}`"
        rows.append([f"`{name}`", value_kind(entry, definitions), default, entry.get("description", "")])
    return table(["setting", "value", "default", "meaning"], rows) if rows else "This method has no settings."


def _default(entry: dict[str, Any]) -> str:
    value = entry.get("default")
    if value is None:
        return "null" if "default" in entry else "the first type listed, with its defaults"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


class _Markdown(SphinxDirective):
    """A directive whose content is Markdown that the code writes."""

    def markdown(self) -> str:
        """The content; every directive below defines it."""
        raise TypeError(f"{type(self).__name__} defines no markdown()")

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.markdown())


class MethodTable(_Markdown):
    """All methods of all families, each with a link to its page."""

    def markdown(self) -> str:
        rows = [
            [f"`{_VERB[kind]}`", f"[{m.name}](/methods/{kind}/{m.name}.md)", m.summary, cite(m.paper), str(m.version)]
            for kind in FAMILIES
            for m in builtin(kind)
        ]
        return table(["verb", "method", "what it does", "paper", "version"], rows)


class MethodCard(_Markdown):
    """Summary, paper, version and settings of one method."""

    required_arguments = 2

    def markdown(self) -> str:
        kind, name = self.arguments
        method = family(kind).get(name)
        return (
            f"{method.summary[0].upper()}{method.summary[1:]}. Paper: {cite(method.paper)}. "
            f"Version {method.version}.\n\n{settings_table(method.config)}"
        )


class Settings(_Markdown):
    """The fields of a settings class."""

    required_arguments = 1

    def markdown(self) -> str:
        return settings_table(self.arguments[0])


class PaperTable(_Markdown):
    """Papers of the methods in this version."""

    def markdown(self) -> str:
        rows = [
            [cite(m.paper), f"[{m.name}](/methods/{kind}/{m.name}.md)"]
            for kind in FAMILIES
            for m in builtin(kind)
            if m.paper != "baseline"
        ]
        return table(["paper", "method"], rows)


class Command(SphinxDirective):
    """The help text of a command."""

    required_arguments = 1
    optional_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        command: Any = typer.main.get_command(command_line)
        parent = click.Context(command, info_name="honeloom", terminal_width=100, max_content_width=100)
        for name in self.arguments:
            command = command.commands[name]
            parent = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
        text = command.get_help(parent)
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("method-table", MethodTable)
    app.add_directive("method-card", MethodCard)
    app.add_directive("settings", Settings)
    app.add_directive("paper-table", PaperTable)
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
