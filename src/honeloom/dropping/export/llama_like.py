"""What servers' formats can say of a decoder, and the reasons for which they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from honeloom.dropping.export.halves import Source
from honeloom.errors import CheckpointError, ConfigError

__all__ = ["LlamaShape", "llama_shape"]

FAMILIES = ("llama", "mistral", "qwen2")
_MATRICES = frozenset(f"self_attn.{n}_proj" for n in "qkvo") | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
_PARTS = _MATRICES | {"input_layernorm", "post_attention_layernorm"}
_IGNORED = "self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a Llama-like decoder, and its rotary settings.

    Attributes
    ----------
    rope_scaling : mapping or None
        The fields of rope type llama3; None for plain rotary positions.
    biases : frozenset of str
        Matrices of a layer that have a bias ("self_attn.q_proj").
    context : int
        Positions up to which the result means what the source means.
    notes : tuple of str
        What limits it.
    """

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
    notes: tuple[str, ...]


def llama_shape(source: Source, profile: str) -> LlamaShape:
    """Read the sizes of a Llama, Mistral or Qwen 2.

    Raises
    ------
    ConfigError
        The family, its activation, its rotary positions or a tensor of its layers has no place in the format.
    CheckpointError
        The config lacks a size.
    """
    config = source.config
    if config.get("model_type") not in FAMILIES:
        raise _refusal(profile, f"a {config.get('model_type')} is not of the families {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise _refusal(profile, f"hidden_act is {config['hidden_act']!r}, and it knows silu alone")
    biases = _biases(source, profile)
    theta, scaling = _rotary(config, profile)
    context, notes = _context(config)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return LlamaShape(
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            width=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            theta=theta,
            rope_scaling=scaling,
            biases=biases,
            tied="lm_head.weight" not in source.names(),
            context=context,
            notes=notes,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{source.checkpoint.folder}: config.json has no {error.args[0]!r}, which profile {profile} needs"
        ) from None


def _refusal(profile: str, reason: str) -> ConfigError:
    return ConfigError(f"profile {profile}: {reason}; --profile dropped and --profile zero take this model")


def _biases(source: Source, profile: str) -> frozenset[str]:
    """Matrices of layers that have biases, after a check that nothing else is there."""
    found = set()
    for name in source.names():
        place = source.layout.half_of(name)
        if place is None or place[2] == _IGNORED:
            continue
        part, _, kind = place[2].rpartition(".")
        norm = part not in _MATRICES
        if part not in _PARTS or kind not in ("weight", "bias") or (norm and kind == "bias"):
            raise _refusal(profile, f"it has no place for {name!r}")
        if kind == "bias":
            found.add(part)
    return frozenset(found)


def _rotary(config: Mapping[str, Any], profile: str) -> tuple[float, Mapping[str, Any] | None]:
    """Base of the rotary positions, and the settings of llama3's scaling."""
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if float(partial) != 1.0:
        raise _refusal(profile, f"partial_rotary_factor is {partial}, and it turns whole heads alone")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise _refusal(profile, f"rope_type is {kind!r}; default and llama3 can be written")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in settings]
    if missing:
        raise CheckpointError(f"config.json: rope_type is llama3, and its {missing[0]} is not given")
    return float(theta), {"rope_type": "llama3", **{name: settings[name] for name in names}}


def _context(config: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Positions up to which no sliding window would show; the formats cannot say one."""
    limit = int(config.get("max_position_embeddings") or 2048)
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", config.get("model_type") != "qwen2")
    if not window or not used or int(window) >= limit:
        return limit, ()
    return int(window), (
        f"attention has a sliding window of {window} tokens, which this format cannot say: the context is set to "
        f"{window} instead of {limit}, within which results are the same",
    )
