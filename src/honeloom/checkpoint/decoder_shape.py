"""Sizes of a Llama-like decoder, dense or with experts, for formats that can say no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.errors import CheckpointError, ConfigError

__all__ = ["DecoderShape", "Experts", "Refuse", "decoder_shape", "placed"]

Refuse = Callable[[str], ConfigError]
"""Makes the error that says why a format cannot take a model, from the reason."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MATRICES = frozenset(f"self_attn.{n}_proj" for n in "qkvo") | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
_HEAD_NORMS = frozenset({"self_attn.q_norm", "self_attn.k_norm"})
_SPARSE = frozenset({"mlp.gate"} | {f"mlp.experts.{n}_proj" for n in ("gate", "up", "down")})
_SHARED = frozenset({"mlp.shared_expert_gate"} | {f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")})
_ATTENTION = frozenset(f"self_attn.{n}_proj" for n in "qkvo") | _NORMS
_PARTS: Mapping[str, frozenset[str]] = {
    "llama": _MATRICES | _NORMS,
    "mistral": _MATRICES | _NORMS,
    "qwen2": _MATRICES | _NORMS,
    "qwen3": _MATRICES | _NORMS | _HEAD_NORMS,
    "mixtral": _ATTENTION | _SPARSE,
    "qwen2_moe": _ATTENTION | _SPARSE | _SHARED,
    "qwen3_moe": _ATTENTION | _SPARSE | _HEAD_NORMS,
}
"""What layers of a family consist of; experts count as one."""
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts_per_tok": 4, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts_per_tok": 8, "norm_topk_prob": False},
}
"""What a setting that config.json leaves out means in transformers, where that differs by family."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of every layer.

    Attributes
    ----------
    count, used : int
        Experts of a layer, and those that a token uses.
    width, shared_width : int
        Units of an expert, and of the expert that every token uses; 0 without one.
    normalised : bool
        Whether the weights of the experts used sum to 1.
    """

    count: int
    used: int
    width: int
    shared_width: int
    normalised: bool


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a Llama-like decoder, and its rotary settings.

    Attributes
    ----------
    rope_scaling : mapping or None
        The fields of rope type llama3; None for plain rotary positions.
    biases : frozenset of str
        Matrices of a layer that have a bias ("self_attn.q_proj").
    context : int
        Positions up to which the result means what the source means.
    experts : Experts or None
        None for a dense model.
    notes : tuple of str
        What limits it.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocabulary: int
    eps: float
    theta: float
    rope_scaling: Mapping[str, Any] | None
    biases: frozenset[str]
    tied: bool
    context: int
    experts: Experts | None
    notes: tuple[str, ...]


def placed(name: str) -> tuple[int, str, str, int | None] | None:
    """Layer, part, kind (weight or bias) and expert of a layer's tensor; None of any other.

    Mixtral's names for experts become those of the other families.

    Examples
    --------
    >>> placed("model.layers.3.block_sparse_moe.experts.1.w2.weight")
    (3, 'mlp.experts.down_proj', 'weight', 1)
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    part, _, kind = found[2].rpartition(".")
    if part.startswith("block_sparse_moe."):
        head, _, last = part.removeprefix("block_sparse_").rpartition(".")
        part = f"mlp{head.removeprefix('moe')}.{_MIXTRAL.get(last, last)}"
    expert = _EXPERT.fullmatch(part)
    if expert:
        return int(found[1]), f"mlp.experts.{expert[2]}", kind, int(expert[1])
    return int(found[1]), part, kind, None


def decoder_shape(
    config: Mapping[str, Any], tensors: Sequence[ExportTensor], families: Sequence[str], refuse: Refuse
) -> DecoderShape:
    """Read the sizes of a decoder of some families.

    Parameters
    ----------
    config : mapping
        Content of config.json.
    tensors : sequence of ExportTensor
        All tensors, under the names that the stock class has on disk. They decide sizes of experts, and those of heads
        where the config is silent.
    families : sequence of str
        Model types that the format knows.
    refuse : callable
        Makes an error of a reason.

    Raises
    ------
    ConfigError
        The family, its activation, its rotary positions or a tensor of its layers has no place in the format.
    CheckpointError
        The config lacks a size.
    """
    family = str(config.get("model_type"))
    if family not in families:
        raise refuse(f"a {family} is not of the families {', '.join(families)}")
    config = {**_DEFAULTS.get(family, {}), **{k: v for k, v in config.items() if v is not None}}
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act is {config['hidden_act']!r}, and it knows silu alone")
    shapes = _shapes(tensors, family, refuse)
    theta, scaling = _rotary(config, refuse)
    context, notes = _context(config)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        queries = shapes.get("self_attn.q_proj.weight", (hidden,))
        return DecoderShape(
            family=family,
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or queries[0] // heads),
            width=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            theta=theta,
            rope_scaling=scaling,
            biases=frozenset(name.removesuffix(".bias") for name in shapes if name.endswith(".bias")),
            tied=all(t.name != "lm_head.weight" for t in tensors),
            context=context,
            experts=_experts(config, shapes) if "mlp.gate.weight" in shapes else None,
            notes=notes,
        )
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error.args[0]!r}, which this format needs") from None


def _shapes(tensors: Sequence[ExportTensor], family: str, refuse: Refuse) -> dict[str, tuple[int, ...]]:
    """Shapes of what layers consist of, after a check that nothing else is there."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        place = placed(tensor.name)
        if place is None or place[1] == "self_attn.rotary_emb":
            continue
        _, part, kind, _ = place
        if family in ("qwen2_moe", "qwen3_moe") and part in _MATRICES - _ATTENTION:
            raise refuse(f"layer {place[0]} has an MLP without experts, and it has experts in every layer or in none")
        norm = part not in _MATRICES
        if part not in _PARTS[family] or kind not in ("weight", "bias") or (norm and kind == "bias"):
            raise refuse(f"it has no place for {tensor.source or tensor.name!r}")
        found.setdefault(f"{part}.{kind}", tensor.shape)
    return found


def _experts(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Experts:
    shared = shapes.get("mlp.shared_expert.gate_proj.weight")
    return Experts(
        count=shapes["mlp.gate.weight"][0],
        used=int(config["num_experts_per_tok"]),
        width=shapes["mlp.experts.gate_proj.weight"][0],
        shared_width=shared[0] if shared else 0,
        normalised=bool(config["norm_topk_prob"]),
    )


def _rotary(config: Mapping[str, Any], refuse: Refuse) -> tuple[float, Mapping[str, Any] | None]:
    """Base of the rotary positions, and the settings of llama3's scaling."""
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if float(partial) != 1.0:
        raise refuse(f"partial_rotary_factor is {partial}, and it turns whole heads alone")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise refuse(f"rope_type is {kind!r}; default and llama3 can be written")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in settings]
    if missing:
        raise CheckpointError(f"config.json: rope_type is llama3, and its {missing[0]} is not given")
    return float(theta), {"rope_type": "llama3", **{name: settings[name] for name in names}}


def _context(config: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Positions up to which no sliding window would show; the formats cannot say one."""
    limit = int(config.get("max_position_embeddings") or 2048)
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", not str(config.get("model_type")).startswith("qwen"))
    if not window or not used or int(window) >= limit:
        return limit, ()
    return int(window), (
        f"attention has a sliding window of {window} tokens, which this format cannot say: the context is set to "
        f"{window} instead of {limit}, within which results are the same",
    )
