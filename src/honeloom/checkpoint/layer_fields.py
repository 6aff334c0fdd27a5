"""What a config says of single layers, carried over to a model with other layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from honeloom.checkpoint.architectures import layer_count
from honeloom.errors import CheckpointError

__all__ = ["Picked", "gather_layer_fields"]

Picked = Sequence[tuple[Mapping[str, Any], int]]
"""Of every layer of a model the config of the model it comes from, and its number there."""

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PER_LAYER = frozenset({
    "layer_types", "attention_types", "block_configs", "no_rope_layers", "num_key_value_heads_per_layer",
    "moe_layer_freq", "layers_block_type", "layer_scales", "activation_sparsity_pattern",
})  # fmt: skip
"""Lists with one entry per layer."""
_INDICES = frozenset({"mlp_only_layers", "moe_layers", "full_attn_idxs", "hybrid_layer_ids"})
"""Lists of layers' numbers."""
_NO_LAYERS = frozenset({"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "mrope_section"})
"""Lists of other things, whatever their length."""
_BY_INDEX = ("scale_attn_by_inverse_layer_idx", "scale_attention_by_inverse_layer_idx")


def gather_layer_fields(config: Mapping[str, Any], picked: Picked) -> dict[str, Any]:
    """Fields of config.json to change for a model made of layers of this and other models, in any order.

    Parameters
    ----------
    config : mapping
        Content of the config.json to change.
    picked : sequence of (mapping, int)
        For every layer of the new model the config of the model it comes from, and its number there.

    Returns
    -------
    dict
        Keys of the config's top level; for a model that also sees, the whole changed `text_config`.

    Raises
    ------
    CheckpointError
        A field holds by a rule that the new order breaks, its meaning per layer is not known, or a model does not say
        what another says of its layers.
    """
    if "text_config" in config:
        text = dict(config["text_config"])
        inner = [(other.get("text_config", other), layer) for other, layer in picked]
        return {"text_config": {**text, **gather_layer_fields(text, inner)}}
    count = layer_count(config)
    if all(other is config for other, _ in picked) and [layer for _, layer in picked] == list(range(count)):
        return {}
    changes: dict[str, Any] = {key: len(picked) for key in _COUNTS if key in config}
    _refuse_rules(picked)
    for key, value in config.items():
        if key in _INDICES and isinstance(value, list):
            changes[key] = [new for new, (other, old) in enumerate(picked) if old in other.get(key, ())]
        elif key in _PER_LAYER and isinstance(value, list):
            changes[key] = [_entry(key, other, old) for other, old in picked]
        elif key == "per_layer_config" and isinstance(value, dict):
            found = [{int(n): v for n, v in other.get(key, {}).items()}.get(old) for other, old in picked]
            changes[key] = {str(new): settings for new, settings in enumerate(found) if settings is not None}
        elif isinstance(value, list) and len(value) == count > 1 and key not in _NO_LAYERS:
            raise CheckpointError(
                f"config.json: {key} has as many entries as there are layers ({count}), and what it says of each "
                "is not known here; layers of this model cannot be picked safely"
            )
    changes |= _expanded_types(picked)
    for key, rule in _RULES.items():
        if isinstance(config.get(key), int):
            changes[key] = rule(key, picked)
    return changes


def _entry(key: str, config: Mapping[str, Any], layer: int) -> Any:
    value, count = config.get(key), layer_count(config)
    if not isinstance(value, list) or len(value) != count:
        length = len(value) if isinstance(value, list) else "no"
        raise CheckpointError(f"config.json: {key} has {length} entries for {count} layers, in one of the models")
    return value[layer]


def _expanded_types(picked: Picked) -> dict[str, Any]:
    """A pattern (every p-th layer attends to everything) as an explicit list, which alone survives a new order."""
    patterns = [config.get("sliding_window_pattern") for config, _ in picked]
    if any(config.get("layer_types") for config, _ in picked):
        return {}
    known = [pattern for pattern in patterns if isinstance(pattern, int) and pattern > 0]
    if len(known) < len(picked):
        return {}
    every = [(old + 1) % p == 0 for p, (_, old) in zip(known, picked, strict=True)]
    return {"layer_types": ["full_attention" if full else "sliding_attention" for full in every]}


def _refuse_rules(picked: Picked) -> None:
    """Rules by the layer's number, which the new numbers would change."""
    for new, (config, old) in enumerate(picked):
        for key in _BY_INDEX:
            if config.get(key):
                raise CheckpointError(f"config.json: {key} is set, so a layer's arithmetic depends on its place")
        for key in ("decoder_sparse_step", "interleave_moe_layer_step", "full_attn_mod"):
            step = config.get(key)
            if isinstance(step, int) and step > 1 and (old - new) % step:
                raise CheckpointError(
                    f"config.json: {key} is {step}, a rule by the layer's number that the new order breaks; "
                    f"move whole groups of {step} layers"
                )
        if config.get("use_sliding_window") and config.get("max_window_layers") and not config.get("layer_types"):
            raise CheckpointError(
                "config.json: max_window_layers says which layers have a window; layer_types must be set"
            )
        if config.get("num_kv_shared_layers"):
            raise CheckpointError("config.json: num_kv_shared_layers is set, so layers use keys of layers before them")


def _leading(key: str, picked: Picked) -> int:
    """How many of the first layers are below a number, if all of those come first."""
    below = [old < int(config.get(key, 0)) for config, old in picked]
    count = sum(below)
    if not all(below[:count]):
        raise CheckpointError(f"config.json: {key} divides the layers, and the new order mixes both sides of it")
    return count


_RULES: Mapping[str, Callable[[str, Picked], int]] = {
    "first_k_dense_replace": _leading,
    "max_window_layers": lambda key, picked: len(picked),
}
