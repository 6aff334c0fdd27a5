"""mergekit-moe's YAML in our words: the same mixture, with a gate made at the place where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from honeloom.errors import ConfigError

__all__ = ["differences", "is_mergekit_moe", "translate"]

_GATES: Mapping[str, dict[str, Any]] = {
    "hidden": {"type": "prompts", "pooling": "last"},
    "hidden_avg": {"type": "prompts", "pooling": "mean"},
    "hidden_last": {"type": "prompts", "pooling": "last"},
    "random": {"type": "random"},
}
_REFUSED: Mapping[str, str] = {
    "cheap_embed": "it compares embeddings with what the MLP of a layer receives, which are not alike; take hidden",
    "uniform_random": "its rows are all positive, so they hardly differ in direction; take random",
}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_FORMATS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_KNOWN = (
    "base_model", "gate_mode", "dtype", "experts_per_token", "experts", "shared_experts", "architecture", "router",
)  # fmt: skip
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale", "model")


def is_mergekit_moe(data: Mapping[str, Any]) -> bool:
    """Whether a configuration is written in mergekit-moe's words."""
    experts = data.get("experts")
    named = isinstance(experts, list) and any(isinstance(e, Mapping) and "source_model" in e for e in experts)
    return named or "gate_mode" in data


def differences(config: Any) -> list[str]:
    """Where a mergekit-moe file gives another result here than in mergekit, one line each.

    Parameters
    ----------
    config : MixConfig
        As translated.
    """
    if config.source_format != "mergekit":
        return []
    lines = [
        "tensors have the names that transformers, vLLM and llama.cpp read; mergekit writes those of transformers 5"
    ]
    if config.router.type == "prompts":
        lines.append(
            "gates are made from what the router receives, after the norm before the MLP; mergekit takes the stream "
            "that enters the layer"
        )
        lines.append("the mean over the experts is taken from the gates; mergekit leaves it in")
    if config.router.type == "random":
        lines.append("random gates have rows of length 1; mergekit's have normal entries")
    if config.shared_expert is not None:
        lines.append("the shared expert counts whole: its output is doubled, for its zero gate halves it")
    return lines


def translate(data: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a mergekit-moe configuration; whatever it cannot express is refused by name.

    Settings of ours beside those of mergekit (level, format, seed, ...) are kept, and count before its own.

    Raises
    ------
    ConfigError
        A gate mode, an architecture or a setting of an expert has no counterpart.
    """
    rest = {k: v for k, v in data.items() if k not in _KNOWN}
    mode = str(data.get("gate_mode", "hidden"))
    if mode in _REFUSED:
        raise ConfigError(f"gate_mode {mode}: {_REFUSED[mode]}")
    if mode not in _GATES:
        raise ConfigError(f"gate_mode {mode!r}: must be one of {', '.join([*_GATES, *_REFUSED])}")
    gate = _GATES[mode]
    prompts = gate["type"] == "prompts"
    if prompts and (rest.get("level", "ffn") != "ffn" or rest.get("router_input") == "sample"):
        gate = {**gate, "pooling": "mean"}  # gates of samples see nothing else
    result: dict[str, Any] = {
        "router": data.get("router", gate), "source_format": "mergekit",
        "experts": [_expert(e, i, prompts) for i, e in enumerate(data.get("experts") or [])],
    }  # fmt: skip
    if data.get("base_model") is not None:
        result["base_model"] = _reference(data["base_model"])
    if data.get("experts_per_token") is not None:
        result["top_k"] = data["experts_per_token"]
    if data.get("dtype") is not None:
        result["dtype"] = _DTYPES.get(str(data["dtype"]), data["dtype"])
    if data.get("architecture") is not None:
        result["format"] = _format(str(data["architecture"]))
    shared = data.get("shared_experts") or []
    if len(shared) > 1:
        raise ConfigError(f"shared_experts: {len(shared)} are given; there can be one")
    if shared:
        result["shared_expert"] = _shared(shared[0])
    return {**result, **rest}


def _format(architecture: str) -> str:
    if architecture == "deepseek":
        raise ConfigError(
            "architecture deepseek: its attention has low-rank projections that these models lack; leave architecture "
            "out"
        )
    if architecture not in _FORMATS:
        raise ConfigError(f"architecture {architecture!r}: must be one of {', '.join(_FORMATS)}")
    return _FORMATS[architecture]


def _expert(entry: Any, index: int, prompts: bool) -> dict[str, Any]:
    _check_entry(entry, f"experts.{index}")
    expert: dict[str, Any] = {"model": _reference(entry.get("source_model", entry.get("model")))}
    if prompts:  # a random gate does not look at them
        expert["prompts"] = tuple(entry.get("positive_prompts") or ())
        expert["negative_prompts"] = tuple(entry.get("negative_prompts") or ())
    return expert


def _check_entry(entry: Any, place: str) -> None:
    if not isinstance(entry, Mapping) or not ("source_model" in entry or "model" in entry):
        raise ConfigError(f"{place}: must be a mapping with source_model")
    unknown = sorted(set(entry) - set(_EXPERT))
    if unknown:
        raise ConfigError(f"{place}: unknown key {unknown[0]!r} (known: {', '.join(_EXPERT)})")
    if entry.get("noise_scale"):
        raise ConfigError(
            f"{place}.noise_scale {entry['noise_scale']}: noise on weights makes an expert worse and a mixture no "
            "better; leave it out"
        )
    scale = entry.get("residual_scale")
    if scale not in (None, 1, 1.0):
        raise ConfigError(
            f"{place}.residual_scale {scale}: an expert counts whole here; leave it out, or scale the model's down "
            "projections with merge, method passthrough"
        )


def _shared(entry: Any) -> str:
    _check_entry(entry, "shared_experts.0")
    return _reference(entry.get("source_model", entry.get("model")))


def _reference(value: Any) -> str:
    """A model as one string: path or id, @revision, +adapter."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {"model", "lora", "path", "revision"})
        if unknown:
            raise ConfigError(f"model {dict(value)!r}: {unknown[0]!r} has no counterpart; write path@revision+adapter")
        text = _reference(value.get("model", value.get("path")))
        if value.get("revision") and "model" not in value:
            text += f"@{value['revision']}"
        return f"{text}+{_reference(value['lora'])}" if value.get("lora") else text
    raise ConfigError(f"model {value!r}: must be a path or a hub id, with @revision and +adapter as needed")
