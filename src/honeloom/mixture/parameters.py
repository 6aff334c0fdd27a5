"""Which tensors of a model folder are weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from honeloom.checkpoint.architectures import Architecture, tensor_shapes
from honeloom.errors import CheckpointError
from honeloom.mixture.layout import Names

__all__ = ["parameters"]

_COMPUTED = (".rotary_emb.inv_freq", ".masked_bias")


def parameters(tensors: Iterable[str], config: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """Names on disk of a model's weights, in their order: without tables that every loader computes.

    Parameters
    ----------
    tensors : iterable of str
        Names on disk.
    config : mapping
        Content of config.json.
    architecture : Architecture
        The model's layout.
    """
    names = Names(architecture)
    try:
        known = {names.stock(name) for name in tensor_shapes(config)}
    except CheckpointError:  # a family without known sizes
        known = set()

    def stray(stock: str) -> bool:
        return bool(known) and names.layer(stock) is not None and stock not in known

    return [name for name in tensors if not name.endswith(_COMPUTED) and not stray(names.stock(name))]
