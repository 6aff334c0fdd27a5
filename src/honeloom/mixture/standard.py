"""Which standard folder can hold a mixture, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from honeloom.errors import ConfigError

__all__ = ["choose_format", "obstacle", "standard_config"]

Config = Mapping[str, Any]

_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
_CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
_PARENTS = {"mixtral": ("llama", "mistral"), "qwen2_moe": ("llama", "mistral", "qwen2"), "qwen3_moe": ("qwen3",)}


def choose_format(
    wanted: str, trunk: Config, *, level: str, token: bool, linear: bool, shared: bool
) -> tuple[str, str]:
    """The format to write, and why it is none of the standard ones, if it is not.

    Parameters
    ----------
    wanted : str
        auto, honeloom, mixtral, qwen2_moe or qwen3_moe.
    trunk : mapping
        The base's configuration, defaults filled in.
    level : str
        ffn, block or model.
    token, linear, shared : bool
        Whether tokens are routed, gates are linear, and there is a shared expert.

    Raises
    ------
    ConfigError
        The format that was asked for cannot hold it; the message says why.
    """
    if wanted == "honeloom":
        return wanted, ""
    if wanted != "auto":
        reason = _unfit(level, token, linear) or obstacle(wanted, trunk, shared=shared)
        if reason:
            raise ConfigError(f"format {wanted}: {reason}; take format: auto or honeloom")
        return wanted, ""
    reason = _unfit(level, token, linear)
    if reason:
        return "honeloom", reason
    family = str(trunk.get("model_type"))
    fitting = [name for name, parents in _PARENTS.items() if family in parents]
    reasons = {name: obstacle(name, trunk, shared=shared) for name in fitting}
    for name, reason in reasons.items():
        if not reason:
            return name, ""
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return "honeloom", told or f"no standard mixture has the layers of {family}"


def _unfit(level: str, token: bool, linear: bool) -> str:
    if level != "ffn":
        return f"standard mixtures route MLPs, not level {level}"
    if not token:
        return "standard mixtures route tokens, not samples"
    return "" if linear else "standard mixtures have linear gates"


def obstacle(name: str, trunk: Config, *, shared: bool) -> str:
    """Why a standard folder cannot hold experts of a base; empty if it can."""
    family = str(trunk.get("model_type"))
    if family not in _PARENTS[name]:
        return f"it holds {' and '.join(_PARENTS[name])} models, and the base is {family}"
    if name != "qwen2_moe" and shared:
        return "it has no shared expert"
    if trunk.get("mlp_bias"):
        return "mlp_bias is set in the base, and its experts have no biases"
    if trunk.get("attention_bias") and name != "qwen3_moe":
        return "attention_bias is set in the base, and its attention has no such biases"
    if trunk.get("pretraining_tp", 1) not in (None, 1):
        return f"pretraining_tp is {trunk['pretraining_tp']} in the base"
    windowed = "sliding_attention" in (trunk.get("layer_types") or ())
    if windowed and name == "qwen3_moe":
        return "some layers of the base have a sliding window, and its layers are all alike"
    if family == "mistral" and name == "qwen2_moe" and trunk.get("sliding_window"):
        return "the base has a sliding window in all layers"
    return ""


def standard_config(
    name: str, trunk: Config, *, experts: int, top_k: int, dense: int, dtype: str, shared_width: int
) -> dict[str, Any]:
    """Content of config.json of a standard mixture.

    Parameters
    ----------
    name : str
        mixtral, qwen2_moe or qwen3_moe.
    trunk : mapping
        The base's configuration, defaults filled in.
    experts, top_k, dense : int
        Sizes.
    dtype : str
        "bfloat16", for example.
    shared_width : int
        Hidden units of Qwen 2's shared expert.
    """
    config: dict[str, Any] = {"architectures": [_CLASSES[name]], "model_type": name}
    config |= {key: trunk.get(key) for key in _COMMON if key in trunk}
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config |= {"num_key_value_heads": heads, "head_dim": size}
    config |= _rope(trunk)
    config |= {"torch_dtype": dtype, "num_experts_per_tok": top_k, "output_router_logits": False}
    if name == "mixtral":
        return {**config, "num_local_experts": experts, "sliding_window": trunk.get("sliding_window")}
    config |= {
        "num_experts": experts, "moe_intermediate_size": config["intermediate_size"], "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": list(range(dense)),
        "use_sliding_window": bool(trunk.get("use_sliding_window")), "sliding_window": trunk.get("sliding_window"),
    }  # fmt: skip
    if name == "qwen3_moe":
        return {**config, "attention_bias": bool(trunk.get("attention_bias"))}
    windows = {key: trunk[key] for key in ("max_window_layers", "layer_types") if trunk.get(key) is not None}
    return {**config, **windows, "qkv_bias": True, "shared_expert_intermediate_size": shared_width}


def _rope(trunk: Config) -> dict[str, Any]:
    """Rotary settings in the words of transformers 5, and in those of loaders before it."""
    rope = dict(trunk.get("rope_parameters") or {})
    theta = rope.get("rope_theta", trunk.get("rope_theta"))
    found: dict[str, Any] = {"rope_parameters": rope, "rope_theta": theta}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return found
