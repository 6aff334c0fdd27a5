"""What honeloom knows of each model family: one file per layout, nothing else branches on a family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from honeloom.checkpoint.architectures import gemma, gpt2, gpt_neox, llama, moe, olmo2
from honeloom.checkpoint.architectures.layout import Architecture
from honeloom.errors import CheckpointError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture_of",
    "layer_count",
    "layer_tensors",
    "output_tensors",
    "tensor_shapes",
]

ARCHITECTURES: dict[str, Architecture] = {
    layout.model_type: layout
    for family in (llama, gemma, olmo2, gpt_neox, gpt2, moe)
    for layout in family.LAYOUTS
}  # fmt: skip
"""Model type -> layout."""

_LLAMA_NAMES = frozenset(
    f"model.layers.0.{n}.weight"
    for n in ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
)
_OTHER_STREAMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm")


def architecture_of(config: Mapping[str, Any], tensor_names: Iterable[str] | None = None) -> Architecture:
    """Find the layout of a model.

    Parameters
    ----------
    config : mapping
        Content of config.json.
    tensor_names : iterable of str, optional
        Names on disk; an unlisted family is accepted if they follow the Llama layout.

    Raises
    ------
    CheckpointError
        The family is not listed and the names (if given) do not follow the Llama layout.
    """
    model_type = config.get("model_type")
    if model_type == "gpt_neox" and config.get("use_parallel_residual") is False:
        return replace(gpt_neox.PARALLEL, mid_stream=gpt_neox.PARALLEL.mlp_norm)
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    names = set(tensor_names or ())
    missing = sorted(_LLAMA_NAMES - names)
    odd = next((n for n in sorted(names) if any(part in n for part in _OTHER_STREAMS)), None)
    if not missing and odd is None:
        return Architecture(str(model_type))
    reason = (
        "its tensor names were not given" if not names else f"it has {odd!r}" if odd else f"it has no {missing[0]!r}"
    )
    raise CheckpointError(
        f"model type {model_type!r} is not known and does not follow the Llama layout: {reason}; "
        f"known types: {', '.join(ARCHITECTURES)}"
    )


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes of every parameter of a decoder, from its config alone.

    Parameters
    ----------
    config : mapping
        Content of config.json; of a model that also sees, the text part counts.

    Returns
    -------
    dict
        A tied head is left out. Rotary tables and other buffers do not count.

    Raises
    ------
    CheckpointError
        The family is not listed, or the config lacks a size.
    """
    architecture = architecture_of(config)
    text = config.get("text_config") or config
    try:
        hidden, vocabulary = text.get("hidden_size") or text["n_embd"], text["vocab_size"]
        shapes: dict[str, tuple[int, ...]] = {f"{architecture.embeddings}.weight": (vocabulary, hidden)}
        if architecture.positions:
            shapes[f"{architecture.positions}.weight"] = (text["n_positions"], hidden)
        for layer in range(layer_count(config)):
            inner = architecture.layer_shapes(text, layer)
            shapes |= {f"{architecture.disk_layers[0]}.{layer}.{name}": shape for name, shape in inner.items()}
    except KeyError as error:
        raise CheckpointError(
            f"config.json has no {error.args[0]!r}, which a {architecture.model_type} needs"
        ) from None
    shapes[f"{architecture.final_norm}.weight"] = (hidden,)
    if architecture.norm_bias:
        shapes[f"{architecture.final_norm}.bias"] = (hidden,)
    if not config.get("tie_word_embeddings", architecture.tied):
        shapes[f"{architecture.disk_head}.weight"] = (vocabulary, hidden)
    return shapes


def layer_count(config: Mapping[str, Any]) -> int:
    """Number of decoder layers; CheckpointError if the config does not say."""
    for part in (config, config.get("text_config") or {}):
        for key in ("num_hidden_layers", "n_layer"):
            if isinstance(part.get(key), int):
                return int(part[key])
    raise CheckpointError("config.json names no number of layers (num_hidden_layers or n_layer)")


def layer_tensors(architecture: Architecture, names: Iterable[str], layer: int) -> list[str]:
    """Names on disk that belong to a layer, in the order given."""
    prefixes = tuple(f"{prefix}.{layer}." for prefix in architecture.disk_layers)
    return [name for name in names if name.startswith(prefixes)]


def output_tensors(
    architecture: Architecture, names: Iterable[str], layer: int, branch: Literal["attention", "mlp"]
) -> list[str]:
    """Names on disk of a branch's output projection in a layer, in the order given.

    Raises
    ------
    CheckpointError
        There is none, so the files do not have this layout.
    """
    patterns = architecture.attention_out if branch == "attention" else architecture.mlp_out
    heads = "|".join(re.escape(prefix) for prefix in architecture.disk_layers)
    wanted = re.compile(rf"(?:{heads})\.{layer}\.(?:{'|'.join(patterns)})")
    found = [name for name in names if wanted.fullmatch(name)]
    if not found:
        raise CheckpointError(
            f"layer {layer} of this {architecture.model_type} model has no tensor like {' or '.join(patterns)}; "
            "its files do not have the layout of that model type"
        )
    return found
