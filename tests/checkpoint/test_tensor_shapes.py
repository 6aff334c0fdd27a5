"""Shapes from the config alone, against the modules that transformers builds."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from honeloom.checkpoint.architectures import ARCHITECTURES, tensor_shapes
from honeloom.errors import CheckpointError

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SPECIAL = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "gemma2": {**SMALL, "head_dim": 16},
    "gemma3_text": {**SMALL, "head_dim": 16},
    "phi3": {**SMALL, "pad_token_id": 0},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3": {**SMALL, "head_dim": 16},
    "qwen2_moe": {
        **SMALL,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**SMALL, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}


def build(model_type, **changes):
    config = CONFIG_MAPPING[model_type](**{**SPECIAL.get(model_type, SMALL), **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"gemma3"}))
def test_parameters_are_those_of_transformers(model_type, tied):
    model = build(model_type, tie_word_embeddings=tied)
    config = json.loads(model.config.to_json_string())
    shapes = tensor_shapes(config)
    built = {n.replace("lm_head", ARCHITECTURES[model_type].disk_head): p for n, p in model.named_parameters()}
    assert sum(torch.Size(s).numel() for s in shapes.values()) == sum(p.numel() for p in built.values())
    if "moe" not in model_type and model_type != "mixtral":  # in memory their experts are fused
        assert {n: tuple(p.shape) for n, p in built.items()} == shapes


def test_the_text_tower_counts():
    text = json.loads(CONFIG_MAPPING["gemma3_text"](**SPECIAL["gemma3_text"]).to_json_string())
    shapes = tensor_shapes({"model_type": "gemma3", "text_config": text})
    assert shapes["model.language_model.embed_tokens.weight"] == (64, 32)
    assert len(shapes) == len(tensor_shapes(text))


@pytest.mark.parametrize(
    ("model_type", "bias"), [("llama", "attention_bias"), ("llama", "mlp_bias"), ("qwen3", "attention_bias")]
)
def test_biases(model_type, bias):
    model = build(model_type, **{bias: True})
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == tensor_shapes(
        json.loads(model.config.to_json_string())
    )


def test_published_sizes():
    llama3 = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    assert sum(torch.Size(s).numel() for s in tensor_shapes(llama3).values()) == 8_030_261_248


def test_a_config_without_a_size_is_refused():
    with pytest.raises(CheckpointError, match="intermediate_size"):
        tensor_shapes(
            {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 9, "num_attention_heads": 2}
        )
    with pytest.raises(CheckpointError, match="known types"):
        tensor_shapes({"model_type": "rwkv", "num_hidden_layers": 1})
