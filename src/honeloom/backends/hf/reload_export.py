"""Writing an export of any profile, and opening it again by the rules of the runtimes it is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from honeloom.backends.hf.dropped_model import NoAttention, NoMlp
from honeloom.backends.hf.load import Loading, load_model
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export.decilm import ffn_width
from honeloom.dropping.export.plan import ExportPlan
from honeloom.dropping.export.writing import write_export
from honeloom.errors import CheckpointError

__all__ = ["GGUF_NAME", "reload_export", "save_export"]

GGUF_NAME = "model.gguf"


def save_export(folder: Path, checkpoint: Checkpoint, plan: ExportPlan) -> int:
    """Write a model folder, or the one file of profile gguf, into an existing folder.

    Returns
    -------
    int
        Bytes of the weights.

    Raises
    ------
    MissingExtraError
        Profile gguf, and the package `gguf` is not installed.
    """
    if plan.profile == "gguf":
        from honeloom.backends.gguf import write_gguf  # the package is an extra

        return write_gguf(folder / GGUF_NAME, checkpoint, plan.keys, plan.tensors)
    return write_export(folder, checkpoint, plan)


def reload_export(folder: Path, profile: str, *, loading: Loading | None = None) -> Any:
    """A written export as a model that gives logits for token ids.

    zero, native and dropped are loaded as anyone would; decilm and gguf are computed from the written
    files alone as their runtimes read them, in float32 on the host.

    Raises
    ------
    CheckpointError
        What was written cannot be read.
    """
    if profile == "gguf":
        from honeloom.backends.gguf_model import GgufModel  # the package is an extra

        return GgufModel(folder / GGUF_NAME)
    return _decilm(folder) if profile == "decilm" else load_model(folder, loading=loading)


def _decilm(folder: Path) -> LlamaForCausalLM:
    """Llama's modules, those that a block's settings give it, with the file's tensors."""
    config = read_config(folder)
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: checkpoint.read(name, torch.float32) for name in checkpoint.names()}
    model = LlamaForCausalLM(_llama_config(config, tensors))
    for layer, block in zip(model.model.layers, config["block_configs"], strict=True):
        if block["attention"]["no_op"]:
            layer.self_attn, layer.input_layernorm = NoAttention(), torch.nn.Identity()
        if block["ffn"]["no_op"]:
            layer.mlp, layer.post_attention_layernorm = NoMlp(), torch.nn.Identity()
        _fit_biases(layer, config)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its tensors are not those that block_configs asks for: {error}") from None
    return model.eval()


def _llama_config(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    blocks, hidden = config["block_configs"], config["hidden_size"]
    groups = [b["attention"]["n_heads_in_group"] for b in blocks if not b["attention"]["no_op"]]
    widths = [ffn_width(b["ffn"]["ffn_mult"], hidden) for b in blocks if not b["ffn"]["no_op"]]
    taken = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
    fields = {key: config[key] for key in (*taken, "rms_norm_eps", "tie_word_embeddings", "attention_bias")}
    rope = {"rope_theta": config["rope_theta"], "rope_type": "default", **(config["rope_scaling"] or {})}
    return AutoConfig.for_model(
        LlamaConfig.model_type, **fields, rope_parameters=rope, mlp_bias=config.get("mlp_bias", False),
        num_key_value_heads=config["num_attention_heads"] // groups[0], intermediate_size=(widths or [1])[0],
    )  # fmt: skip


def _fit_biases(layer: Any, config: Mapping[str, Any]) -> None:
    """Biases of queries, keys and values alone, which Llama's own switch cannot say."""
    if config.get("qkv_bias") and not isinstance(layer.self_attn, NoAttention):
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, torch.nn.Linear(linear.in_features, linear.out_features))
