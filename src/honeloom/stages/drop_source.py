"""What `drop` is given, looked at before any weight is loaded: layers, what is missing already, what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honeloom.checkpoint.architectures import layer_count
from honeloom.checkpoint.folders import read_config, refuse_mixture, refuse_quantised
from honeloom.dropping.choice import named_drops
from honeloom.dropping.config import DropConfig
from honeloom.dropping.plan import Room, require_room
from honeloom.errors import CheckpointError, ConfigError, MissingExtraError
from honeloom.stages.inputs import ResolvedInput

__all__ = ["DropSource", "open_source", "room_of"]

_DROPPED = "honeloom_dropped"


@dataclass(frozen=True, slots=True)
class DropSource:
    """A model to drop layers of.

    Attributes
    ----------
    folder : Path
        Its files.
    stock : dict
        Its config; of an already dropped model that of its base.
    room : Room
        What may go.
    """

    folder: Path
    stock: dict[str, Any]
    room: Room


def open_source(config: DropConfig, found: ResolvedInput) -> DropSource:
    """Refuse what cannot be dropped from, and numbers that the model cannot give.

    Raises
    ------
    ConfigError, CheckpointError
        An adapter, a mixture, quantised weights, an encoder, or more drops than there are units.
    MissingExtraError
        Profile gguf, and the package `gguf` is not installed.
    """
    if found.base is not None:
        raise ConfigError(f"{found.value} is an adapter; merge it into its base first, then drop layers of the result")
    folder = found.paths[0]
    refuse_mixture(folder, "drop")
    if config.only is None:
        _refuse_quantised(folder)
    stock, room = room_of(config, read_config(folder))
    if stock.get("is_encoder_decoder"):
        raise CheckpointError(f"{folder}: an encoder-decoder; layers of decoders alone can be dropped")
    if config.layers is not None:
        named_drops(config.layers, room)
    require_room(config.counts, room)
    if config.profile == "gguf" and importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("profile gguf needs the package gguf: pip install 'honeloom[gguf]'")
    return DropSource(folder, stock, room)


def _refuse_quantised(folder: Path) -> None:
    try:
        refuse_quantised(folder, "drop")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Importances of quantised weights can be measured (--only scores) and taken for that model "
            "(--scores OUT/scores.json); the how-to 'Quantise a dropped model' has the commands"
        ) from None


def room_of(config: DropConfig, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Room]:
    """The stock config of a model, and what of it may go.

    Parameters
    ----------
    settings : mapping
        Content of config.json.
    """
    stock, spec = dict(settings), {}
    if settings.get("model_type") == _DROPPED:
        base, found = settings.get("base"), settings.get("drop_spec")
        if not isinstance(base, dict) or not isinstance(found, dict):
            raise CheckpointError(f"config.json: a {_DROPPED} needs base and drop_spec; download the folder again")
        stock, spec = dict(base), found
    room = Room(
        layer_count(stock),
        frozenset(spec.get("attention", ())),
        frozenset(spec.get("mlp", ())),
        config.protect_first,
        config.protect_last,
        config.max_run,
        config.pairs,
    )
    if config.protect_first + config.protect_last >= room.layers:
        raise ConfigError(
            f"protect_first {config.protect_first} and protect_last {config.protect_last}: the model has {room.layers} "
            "layers, so nothing may go; protect fewer"
        )
    return stock, room
