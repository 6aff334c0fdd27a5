"""Tiny random models on disk, and an export of them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export import ExportPlan, export_plan, write_export
from honeloom.types.plans import DropPlan

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def save_model(folder: Path, model_type: str = "llama", **fields: Any) -> Path:
    """A random model of a family, without a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def plan_of(source: Path, profile: str, attention=(), mlp=(), block=()) -> ExportPlan:
    """What a profile would write."""
    with Checkpoint.open(source) as checkpoint:
        plan = DropPlan(tuple(attention), tuple(mlp), tuple(block), "cosine", profile)
        return export_plan(checkpoint, plan)


def written(source: Path, target: Path, profile: str, **drops: Any) -> ExportPlan:
    """Write a model folder."""
    target.mkdir(parents=True, exist_ok=True)
    plan = plan_of(source, profile, **drops)
    with Checkpoint.open(source) as checkpoint:
        write_export(target, checkpoint, plan)
    return plan
