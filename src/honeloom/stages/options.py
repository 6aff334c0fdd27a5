"""Options of the verbs' functions that are not settings, and settings read from all that may hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from honeloom.config.base import VerbConfig, validate
from honeloom.config.load import apply_overrides, load_yaml
from honeloom.config.recipe import Recipe, load_recipe
from honeloom.errors import ConfigError
from honeloom.flags import place_flags
from honeloom.registry import load_target
from honeloom.runs.output import Mode
from honeloom.verbs import VERBS
from honeloom.zoo.reading import read_zoo

__all__ = ["choose_mode", "read_recipe", "read_settings", "take_mode", "take_repository"]

_DOCUMENTS = {"merge": "config", "mix": "config", "federate": "config", "glue": "zoo"}
"""Verbs whose settings may come from a file, and the argument that names it."""


def take_repository(verb: str, options: dict[str, Any]) -> str | None:
    """Where the result is pushed to: no setting of the verb, and only of verbs that make a model."""
    return None if verb in ("select", "evaluate") else options.pop("push_to_hub", None)


def read_settings(verb: str, options: dict[str, Any]) -> VerbConfig:
    """Settings from flags; from a file or mapping (`config`, `zoo`) below them, and from `set` above them."""
    overrides = options.pop("set", ())
    config = options.pop(_DOCUMENTS[verb], None) if verb in _DOCUMENTS else None
    read = read_zoo if verb == "glue" else load_yaml
    base = {} if config is None else dict(config) if isinstance(config, dict) else read(Path(config))
    given = apply_overrides({**base, **place_flags(verb, options)}, overrides)
    settings: VerbConfig = validate(load_target(VERBS[verb].config), given, what=verb)
    return settings


def read_recipe(path: Path, overrides: Sequence[str], seed: int | None, withdraw: Sequence[str] = ()) -> Recipe:
    """A recipe with what the caller sets, and further rows withdrawn."""
    return load_recipe(path, [*overrides, *([f"seed={seed}"] if seed is not None else [])], withdraw)


def take_mode(options: dict[str, Any]) -> Mode:
    """What the output folder may hold, by the options of a verb, which are taken out."""
    return choose_mode(options.pop("mode", "new"), options.pop("overwrite", False), options.pop("resume", False))


def choose_mode(mode: Mode, overwrite: bool, resume: bool) -> Mode:
    """One word of three; ConfigError if two exclude each other."""
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other: redo everything, or go on from what is there")
    return "overwrite" if overwrite else "resume" if resume else mode
