"""Profile native: a stock checkpoint of fewer layers, where what survives pairs up into whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.layer_fields import gather_layer_fields
from honeloom.dropping.export.halves import Half, Source, present
from honeloom.dropping.export.plan import ExportPlan
from honeloom.dropping.normalise import Block, is_native, normalise
from honeloom.errors import CheckpointError, ConfigError

__all__ = ["blocks_of", "export", "place_halves", "repaired_fields"]

_OF_ATTENTION = frozenset({
    "layer_types", "attention_types", "no_rope_layers", "num_key_value_heads_per_layer", "full_attn_idxs",
    "max_window_layers",
})  # fmt: skip
"""Fields by layer that speak of attention alone."""
_OF_MLP = frozenset({
    "mlp_only_layers", "moe_layers", "moe_layer_freq", "first_k_dense_replace", "activation_sparsity_pattern",
})  # fmt: skip
"""Fields by layer that speak of the MLP alone."""


def export(source: Source) -> ExportPlan:
    """Rename the surviving halves into blocks, and gather every field of the config that speaks of layers.

    Raises
    ------
    ConfigError
        Some halves stay alone.
    CheckpointError
        A field of the config has no meaning in the new order, or halves of a family that runs both on
        the same stream would have to be paired anew.
    """
    blocks = blocks_of(source)
    if not is_native(blocks):
        alone = [f"attention of layer {a}" for a, m in blocks if m is None and a is not None]
        alone += [f"MLP of layer {m}" for a, m in blocks if a is None and m is not None]
        raise ConfigError(
            f"profile native: {', '.join(alone)} would stay alone, and a stock model has whole blocks only; drop whole "
            "blocks, or the MLP of a layer with the attention of the next one; --profile dropped takes any plan"
        )
    return ExportPlan(
        profile="native",
        tensors=tuple(place_halves(source, blocks)),
        config={**source.config, **repaired_fields(source.config, blocks)},
        blocks=blocks,
        saves=("params", "kv", "flops"),
        loads_in=("transformers", f"whatever loads {source.config.get('model_type')} models"),
    )


def blocks_of(source: Source) -> tuple[Block, ...]:
    """The fewest blocks; of a family with parallel halves every layer that has any is one.

    Raises
    ------
    CheckpointError
        Everything is dropped.
    """
    if source.layout.sequential:
        blocks = normalise(source.layers, source.without_attention, source.without_mlp)
    else:  # both halves read the same stream, so halves of two layers never make a block
        halves = [
            (None if i in source.without_attention else i, None if i in source.without_mlp else i)
            for i in range(source.layers)
        ]
        blocks = tuple(block for block in halves if block != (None, None))
    if not blocks:
        raise CheckpointError(f"{source.checkpoint.folder}: the plan drops everything; at least one block must remain")
    return blocks


def place_halves(source: Source, blocks: Sequence[Block]) -> list[ExportTensor]:
    """All tensors of the source that stay, those of layers under their block's number.

    Raises
    ------
    CheckpointError
        A layer has tensors that belong to no half, or lacks a half that the plan keeps.
    """
    layout, checkpoint = source.layout, source.checkpoint
    found = present(source, source.names())
    tensors = [
        ExportTensor.copied(checkpoint, n) for n in source.names() if layout.half_of(n) is None
    ]  # embedding, final norm, head
    for number, block in enumerate(blocks):
        halves: tuple[Half, Half] = ("attention", "mlp")
        for half, layer in zip(halves, block, strict=True):
            if layer is None:
                continue
            if (layer, half) not in found:
                raise CheckpointError(f"{checkpoint.folder}: no tensors of the {half} of layer {layer}")
            for name in found[layer, half]:
                tensors.append(ExportTensor.copied(checkpoint, name, layout.shifted(name, number)))
    return tensors


def repaired_fields(config: dict[str, Any], blocks: Sequence[Block]) -> dict[str, Any]:
    """Fields of the config to change: of attention after the layer it comes from, of the MLP after its own.

    Raises
    ------
    CheckpointError
        A field speaks of both halves and they come from layers that differ in it, or its rule breaks.
    """
    if "text_config" in config:
        return {"text_config": {**config["text_config"], **repaired_fields(config["text_config"], blocks)}}
    by_attention = gather_layer_fields(config, [(config, int(a or 0)) for a, _ in blocks])
    by_mlp = gather_layer_fields(config, [(config, int(m or 0)) for _, m in blocks])
    changes: dict[str, Any] = {}
    for key in (*by_attention, *(k for k in by_mlp if k not in by_attention)):
        one, other = by_attention.get(key), by_mlp.get(key)
        if one != other and key not in _OF_ATTENTION | _OF_MLP:
            raise CheckpointError(
                f"config.json: {key} speaks of a whole layer, and a block of the result would have its attention and "
                "its MLP from layers that differ in it; drop whole blocks"
            )
        changes[key] = other if key in _OF_MLP else one
    return changes
