"""Tiny random models of many families, what they are without some halves, and exports of them."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from honeloom.backends.hf.reload_export import save_export
from honeloom.checkpoint.architectures import architecture_of
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export import ExportPlan, export_plan
from honeloom.types.plans import DropPlan

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def make_model(model_type: str = "llama", **fields: Any) -> Any:
    """A random model in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES.get(model_type, {}), **fields})
    return AutoModelForCausalLM.from_config(config).eval()


def without(model: Any, attention: Any = (), mlp: Any = ()) -> Any:
    """A copy whose halves have zeros for weights: stock code that adds nothing there."""
    silent = copy.deepcopy(model)
    architecture = architecture_of(model.config.to_dict())
    layers = silent.get_submodule(architecture.layers)
    for layers_of, name in ((attention, architecture.attention), (mlp, architecture.mlp)):
        for index in layers_of:
            for parameter in layers[index].get_submodule(name).parameters():
                torch.nn.init.zeros_(parameter)
    return silent


def export(
    source: Path, target: Path, profile: str, attention: Any = (), mlp: Any = (), block: Any = (), located: Any = None
) -> ExportPlan:
    """Write a model folder, or model.gguf in one."""
    target.mkdir(parents=True, exist_ok=True)
    with Checkpoint.open(source) as checkpoint:
        drops = DropPlan(tuple(attention), tuple(mlp), tuple(block), "cosine", profile)
        plan = export_plan(checkpoint, drops, located)
        save_export(target, checkpoint, plan)
    return plan


def ids_of(count: int = 24, rows: int = 1, vocabulary: int = 97) -> torch.Tensor:
    """Seeded token ids (rows, count), none of them padding."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, vocabulary, (rows, count), generator=generator)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference."""
    return float((one.detach() - other.detach()).abs().max())
