"""Tiny mixtures of stock models, made in memory: what every expert is, is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from honeloom.backends.hf.mixture_model import HoneloomMixtureConfig, HoneloomMixtureForCausalLM
from honeloom.backends.hf.models_mixture import HoneloomModelsConfig, HoneloomModelsForCausalLM
from honeloom.checkpoint.architectures import architecture_of
from honeloom.checkpoint.folders import copy_tokenizer

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 96},
}


def stock(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random stock model in evaluation mode."""
    known = SIZES if family != "gpt2" else {k: v for k, v in SIZES.items() if k in ("vocab_size", "initializer_range")}
    config = AutoConfig.for_model(family, **{**known, **FAMILIES[family], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def mixture(models: Sequence[Any], level: str, *, trunk: Any = None, shared: Any = None, **settings: Any) -> Any:
    """A mixture of stock models with zero gates, all its tensors set by their names; the first is the trunk."""
    trunk = trunk or models[0]
    config = HoneloomMixtureConfig(
        trunk=trunk.config.to_dict(), level=level, experts=[f"e{i}" for i in range(len(models))],
        shared_expert=shared is not None, **settings,
    )  # fmt: skip
    made = HoneloomMixtureForCausalLM(config).eval()
    architecture = architecture_of(trunk.config.to_dict())
    unit = f".{architecture.mlp}" if level == "ffn" else ""
    state = {}
    for name, tensor in trunk.state_dict().items():
        state[f"trunk.{name}"] = tensor
    for index in config.routed:
        place = f"{architecture.layers}.{index}{unit}."
        for name in [n for n in trunk.state_dict() if n.startswith(place)]:
            del state[f"trunk.{name}"]
            for e, model in enumerate(models):
                state[f"trunk.{place}experts.{e}.{name.removeprefix(place)}"] = model.state_dict()[name]
            if shared is not None:
                state[f"trunk.{place}shared.{name.removeprefix(place)}"] = shared.state_dict()[name]
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert unexpected == [] and all(".gate." in name for name in missing)
    return made


def set_gates(model: Any, seed: int = 0, scale: float = 1.0) -> None:
    """Fill all gates with normal draws."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if ".gate." in f".{name}":
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def force(model: Any, expert: int) -> None:
    """Let every gate, made with a bias, choose one expert."""
    for name, tensor in model.named_parameters():
        if name.endswith("gate.bias"):
            tensor.data.zero_()
            tensor.data[expert] = 1e4


def models_mixture(
    models: Sequence[Any], *, tokenizers: Sequence[str | None] | None = None, encoder: Any = None, layer: int = 0,
    **router: Any,
) -> Any:  # fmt: skip
    """A mixture of whole models; the encoder is the first of them, or the first layers of another one."""
    document: dict[str, Any] = {"config": None, "expert": 0, "tokenizer": None}
    if encoder is not None:
        cut = encoder.config.to_dict()
        cut["num_hidden_layers"] = layer + 1
        if cut.get("layer_types"):
            cut["layer_types"] = cut["layer_types"][: layer + 1]
        document = {"config": cut, "expert": None, "tokenizer": None}
    config = HoneloomModelsConfig(
        experts=[
            {"name": f"m{i}", "config": m.config.to_dict(), "tokenizer": (tokenizers or [None] * len(models))[i]}
            for i, m in enumerate(models)
        ],
        encoder=document,
        router={"layer": layer, **router},
    )
    made = HoneloomModelsForCausalLM(config).eval()
    for e, model in enumerate(models):
        made.experts[e].load_state_dict(model.state_dict())
    if encoder is not None:
        held = made.encoder.state_dict()
        made.encoder.load_state_dict({name: encoder.state_dict()[name] for name in held})
    return made


def write_models(folder: Path, made: Any, tokenizers: dict[str, Path], root: Path) -> Path:
    """Save a mixture of whole models with the tokenizers that its config names, and the encoder's at the root."""
    made.save_pretrained(folder)
    for name, source in tokenizers.items():
        (folder / name).mkdir(parents=True)
        copy_tokenizer(source, folder / name)
    copy_tokenizer(root, folder)

    return folder
