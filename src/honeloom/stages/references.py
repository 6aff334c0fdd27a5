"""Whether the stages of a recipe can run, told before the first does: what they refer to, and packages they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from honeloom.config.base import InputField, collect_inputs
from honeloom.config.recipe import Step
from honeloom.errors import ConfigError, MissingExtraError

__all__ = ["check_extras", "check_references", "made_by"]

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


def check_extras(steps: Sequence[Step]) -> None:
    """Refuse a recipe of which a stage needs a package that is not installed, rather than hours later.

    Raises
    ------
    MissingExtraError
        It names the stage, the package and the extra that brings it.
    """
    for step in steps:
        for module, extra in _packages(step):
            if importlib.util.find_spec(module) is None:
                raise MissingExtraError(
                    f"stage {step.name!r} ({step.verb}): {module} is not installed: pip install 'honeloom[{extra}]'"
                )


def _packages(step: Step) -> Iterator[tuple[str, str]]:
    """Modules that a stage imports beside those that are always there, and their extras."""
    config: Any = step.config
    tunes = getattr(getattr(config, "method", None), "tunes", None)
    if step.verb in ("tune", "federate") or getattr(config, "heal", None) or (tunes and tunes()):
        yield "peft", "tune"
    if step.verb == "export" or getattr(config, "profile", None) == "gguf":
        yield "gguf", "gguf"
    if getattr(config, "tasks", None):
        yield "lm_eval", "lm-eval"
    if getattr(config, "ray", None):
        yield "ray", "ray"
    if getattr(config, "engine", "inline") in ("simulation", "deployment"):
        yield "flwr", "federated"
