"""Tensor shapes of a decoder layer, from its config alone.

Each function takes a config (its text part) and returns the names within a layer, as on disk,
with their shapes (out, in). `layer` matters where layers differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "Shapes",
    "dense_mlp",
    "gemma2_layer",
    "gemma3_layer",
    "gpt2_layer",
    "gpt_neox_layer",
    "grouped_attention",
    "llama_layer",
    "mixtral_layer",
    "olmo2_layer",
    "phi3_layer",
    "qwen2_layer",
    "qwen3_layer",
    "qwen2_moe_layer",
    "qwen3_moe_layer",
]

Shapes = dict[str, tuple[int, ...]]


def _weights(prefix: str, out: int, inner: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {f"{prefix}.weight": (out, inner)}
    return {**shapes, f"{prefix}.bias": (out,)} if bias else shapes


def _norms(size: int, *names: str, bias: bool = False) -> Shapes:
    ends = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{end}": (size,) for name in names for end in ends}


def head_size(config: Mapping[str, Any]) -> int:
    """Size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def grouped_attention(
    config: Mapping[str, Any], *, bias: bool = False, out_bias: bool = False, norms: str = ""
) -> Shapes:
    """Attention with key-value groups; `norms` is "head" or "all" where queries and keys are normalised."""
    hidden, size = config["hidden_size"], head_size(config)
    queries = config["num_attention_heads"] * size
    keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * size
    shapes = _weights("self_attn.q_proj", queries, hidden, bias)
    shapes |= _weights("self_attn.k_proj", keys, hidden, bias) | _weights("self_attn.v_proj", keys, hidden, bias)
    shapes |= _weights("self_attn.o_proj", hidden, queries, out_bias)
    if norms:
        shapes |= _norms(size if norms == "head" else queries, "self_attn.q_norm")
        shapes |= _norms(size if norms == "head" else keys, "self_attn.k_norm")
    return shapes


def dense_mlp(hidden: int, width: int, bias: bool = False) -> Shapes:
    """The gated MLP."""
    shapes = _weights("mlp.gate_proj", width, hidden, bias) | _weights("mlp.up_proj", width, hidden, bias)
    return shapes | _weights("mlp.down_proj", hidden, width, bias)


def _gated(config: Mapping[str, Any]) -> Shapes:
    return dense_mlp(config["hidden_size"], config["intermediate_size"], bool(config.get("mlp_bias")))


def llama_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Llama, Mistral."""
    bias = bool(config.get("attention_bias"))
    attention = grouped_attention(config, bias=bias, out_bias=bias)
    return attention | _gated(config) | _norms(config["hidden_size"], "input_layernorm", "post_attention_layernorm")


def qwen2_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Qwen 2: queries, keys and values have biases."""
    norms = _norms(config["hidden_size"], "input_layernorm", "post_attention_layernorm")
    return grouped_attention(config, bias=True) | _gated(config) | norms


def qwen3_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Qwen 3: queries and keys are normalised per head."""
    bias = bool(config.get("attention_bias"))
    norms = _norms(config["hidden_size"], "input_layernorm", "post_attention_layernorm")
    return grouped_attention(config, bias=bias, out_bias=bias, norms="head") | _gated(config) | norms


def phi3_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Phi 3: queries, keys and values are one matrix, gate and up another."""
    hidden, width, size = config["hidden_size"], config["intermediate_size"], head_size(config)
    keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * size
    queries = config["num_attention_heads"] * size
    shapes = _weights("self_attn.qkv_proj", queries + 2 * keys, hidden) | _weights("self_attn.o_proj", hidden, queries)
    shapes |= _weights("mlp.gate_up_proj", 2 * width, hidden) | _weights("mlp.down_proj", hidden, width)
    return shapes | _norms(hidden, "input_layernorm", "post_attention_layernorm")


_FOUR = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def gemma2_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Gemma 2: every branch is normalised before and after."""
    bias = bool(config.get("attention_bias"))
    attention = grouped_attention(config, bias=bias, out_bias=bias)
    return attention | _gated(config) | _norms(config["hidden_size"], *_FOUR)


def gemma3_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Gemma 3: as Gemma 2, with normalised queries and keys."""
    bias = bool(config.get("attention_bias"))
    attention = grouped_attention(config, bias=bias, out_bias=bias, norms="head")
    return attention | _gated(config) | _norms(config["hidden_size"], *_FOUR)


def olmo2_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """OLMo 2: norms after the branches, and over all queries and all keys."""
    bias = bool(config.get("attention_bias"))
    attention = grouped_attention(config, bias=bias, out_bias=bias, norms="all")
    norms = _norms(config["hidden_size"], "post_attention_layernorm", "post_feedforward_layernorm")
    return attention | _gated(config) | norms


def gpt_neox_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """GPT-NeoX, Pythia."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    bias = bool(config.get("attention_bias", True))
    shapes = _weights("attention.query_key_value", 3 * hidden, hidden, bias)
    shapes |= _weights("attention.dense", hidden, hidden, bias)
    shapes |= _weights("mlp.dense_h_to_4h", width, hidden, True) | _weights("mlp.dense_4h_to_h", hidden, width, True)
    return shapes | _norms(hidden, "input_layernorm", "post_attention_layernorm", bias=True)


def gpt2_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """GPT-2, whose matrices are stored (in, out)."""
    hidden = config["n_embd"]
    width = config.get("n_inner") or 4 * hidden
    shapes: Shapes = {}
    for name, inner, out in (
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, width),
        ("mlp.c_proj", width, hidden),
    ):
        shapes |= {f"{name}.weight": (inner, out), f"{name}.bias": (out,)}
    return shapes | _norms(hidden, "ln_1", "ln_2", bias=True)


def mixtral_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Mixtral: a router and experts of three matrices."""
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = grouped_attention(config) | _weights("block_sparse_moe.gate", experts, hidden)
    for expert in range(experts):
        for name, out, inner in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
            shapes |= _weights(f"block_sparse_moe.experts.{expert}.{name}", out, inner)
    return shapes | _norms(hidden, "input_layernorm", "post_attention_layernorm")


def qwen2_moe_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Qwen 2 MoE: as Qwen 3 MoE, and an expert with a gate of its own that every token uses."""
    shapes = _routed(config, layer, qwen2_layer(config, layer))
    if "mlp.gate.weight" in shapes:
        hidden, width = config["hidden_size"], config["shared_expert_intermediate_size"]
        for name, shape in dense_mlp(hidden, width).items():
            shapes[name.replace("mlp.", "mlp.shared_expert.", 1)] = shape
        shapes |= _weights("mlp.shared_expert_gate", 1, hidden)
    return shapes


def qwen3_moe_layer(config: Mapping[str, Any], layer: int) -> Shapes:
    """Qwen 3 MoE: a router and small experts; some layers may be dense."""
    return _routed(config, layer, qwen3_layer(config, layer))


def _routed(config: Mapping[str, Any], layer: int, dense_layer: Shapes) -> Shapes:
    """A layer with a router and small experts in the place of its MLP, unless it is one of the dense ones."""
    dense = layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % config.get("decoder_sparse_step", 1) != 0
    if dense:
        return dense_layer
    shapes = {k: v for k, v in dense_layer.items() if not k.startswith("mlp.")}
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    experts = config.get("num_experts") or config["num_local_experts"]
    shapes |= _weights("mlp.gate", experts, hidden)
    for expert in range(experts):
        for name, shape in dense_mlp(hidden, width).items():
            shapes[name.replace("mlp.", f"mlp.experts.{expert}.", 1)] = shape
    return shapes
