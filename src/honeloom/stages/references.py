"""Whether what a stage refers to can be what it asks for, told before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from honeloom.config.base import InputField, collect_inputs
from honeloom.config.recipe import Step
from honeloom.errors import ConfigError

__all__ = ["check_references", "made_by"]

_NEEDS_FULL = {
    "tune": ("model",), "federate": ("model",), "drop": ("model",), "export": ("model",),
    "aggregate": ("into_base",),
}  # fmt: skip
"""Verb -> places where an adapter is no model."""
_TAKES = {
    "model": ("model", "adapter"), "adapter": ("adapter",), "rows": ("rows",), "scores": ("rows",), "file": ("rows",),
}  # fmt: skip
"""Kind of an input -> kinds of artefacts that it may be."""


def made_by(step: Step) -> str | None:
    """Kind of a stage's artefact as far as its settings tell: model, adapter, rows, scores, gguf; else None."""
    config: Any = step.config
    if step.verb == "tune":
        return "adapter" if config.method.type == "lora" else "model"
    if step.verb == "federate":
        return "adapter" if config.method == "lora" else "model"
    if step.verb == "aggregate":
        return "model" if config.into_base else "adapter"
    if step.verb == "glue":
        return "model" if config.only in (None, "merge") else "scores"
    if step.verb == "drop":
        return "scores" if config.only else "gguf" if config.profile == "gguf" else "model"
    return _MADE.get(step.verb)


_MADE = {
    "select": "rows", "extract-lora": "adapter", "merge": "model", "mix": "model", "export": "gguf",
    "evaluate": "scores",
}  # fmt: skip


def check_references(steps: Sequence[Step]) -> None:
    """Refuse a stage whose input is the artefact of an earlier stage, and of a kind that it cannot read.

    Raises
    ------
    ConfigError
        The message names stage, place, what stands there, and what to do.
    """
    earlier: dict[str, Step] = {}
    for step in steps:
        for field in collect_inputs(step.config):
            if field.value in earlier:
                _check(step, field, earlier[field.value], earlier)
        earlier[str(step.folder)] = step


def _check(step: Step, field: InputField, source: Step, earlier: Mapping[str, Step]) -> None:
    made = made_by(source)
    if made is None or field.kind not in _TAKES:
        return
    if step.verb == "evaluate" and field.place == "against" and source.verb == "evaluate":
        return
    full = field.place in _NEEDS_FULL.get(step.verb, ())
    if made not in _TAKES[field.kind]:
        wanted = " or ".join(
            f"a {k}" if k == "model" else "rows" if k == "rows" else f"an {k}" for k in _TAKES[field.kind]
        )
        raise ConfigError(
            f"stage {step.name!r} ({step.verb}): {field.place} takes {wanted}, and ${source.name} is what "
            f"{source.verb} makes ({made}); refer to another stage"
        )
    if full and made == "adapter":
        raise ConfigError(
            f"stage {step.name!r} ({step.verb}): {field.place} takes a full model, and ${source.name} is an adapter; "
            f"put a stage before it that merges it, and refer to that one: {_merging(source, earlier)}"
        )


def _merging(source: Step, earlier: Mapping[str, Step]) -> str:
    """A stage that makes a full model of an adapter."""
    settings: Mapping[str, Any] = source.config.model_dump(mode="json")
    base = settings.get("model") or settings.get("base") or "BASE"
    base = f"${earlier[base].name}" if base in earlier else base
    return f"{source.name}-full: {{merge: {{base_model: {base}, models: [${source.name}], method: task_arithmetic}}}}"
