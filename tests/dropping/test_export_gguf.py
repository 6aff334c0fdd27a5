"""Profile gguf: names, sizes by block, and what stands for what is missing."""

import json
import math

import pytest
import torch
from export_models import plan_of, save_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from honeloom.checkpoint.export_content import interleave
from honeloom.errors import ConfigError

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def test_whole_blocks_are_plain_llama(llama):
    plan = plan_of(llama, "gguf", attention=[2], mlp=[1])
    assert plan.keys["general.architecture"] == "llama" and plan.keys["llama.block_count"] == 3
    assert plan.keys["llama.attention.head_count"] == 4 and plan.keys["llama.feed_forward_length"] == 64
    taken = {t.name: (t.source, t.heads) for t in plan.tensors}
    assert taken["blk.1.ffn_up.weight"] == ("model.layers.2.mlp.up_proj.weight", 0)
    assert taken["blk.1.attn_q.weight"] == ("model.layers.1.self_attn.q_proj.weight", 4)
    assert taken["blk.1.attn_k.weight"] == ("model.layers.1.self_attn.k_proj.weight", 2)
    assert all(t.source for t in plan.tensors)


def test_a_missing_first_attention_is_one_head_of_zeros_and_a_missing_mlp_zeros(llama):
    plan = plan_of(llama, "gguf", attention=[0, 2], mlp=[3])
    keys, zeros = plan.keys, {t.name: t.shape for t in plan.tensors if t.source is None}
    assert keys["general.architecture"] == "deci"
    assert keys["deci.attention.head_count"] == [1, 4, 0, 4] and keys["deci.attention.head_count_kv"] == [1, 2, 0, 2]
    assert keys["deci.feed_forward_length"] == [64, 64, 64, 32]
    assert zeros == {
        "blk.0.attn_norm.weight": (32,), "blk.0.attn_q.weight": (8, 32), "blk.0.attn_k.weight": (8, 32),
        "blk.0.attn_v.weight": (8, 32), "blk.0.attn_output.weight": (32, 8), "blk.3.ffn_norm.weight": (32,),
        "blk.3.ffn_gate.weight": (32, 32), "blk.3.ffn_up.weight": (32, 32), "blk.3.ffn_down.weight": (32, 32),
    }  # fmt: skip
    assert not any(t.name.startswith("blk.2.attn") for t in plan.tensors)
    assert any("flash attention" in note for note in plan.notes)


def test_no_plan_gives_a_width_of_zero_or_a_first_block_without_heads(llama):
    for attention in range(16):
        for mlp in range(16):
            gone = [[i for i in range(4) if bits >> i & 1] for bits in (attention, mlp)]
            if len(gone[0]) == 4:
                continue
            keys = plan_of(llama, "gguf", attention=gone[0], mlp=gone[1]).keys
            arch = keys["general.architecture"]
            widths, heads = keys[f"{arch}.feed_forward_length"], keys[f"{arch}.attention.head_count"]
            assert min(widths if isinstance(widths, list) else [widths]) > 0
            assert (heads if isinstance(heads, list) else [heads])[0] > 0


def test_rotary_pairs_stand_side_by_side():
    rows = torch.arange(16).reshape(16, 1)
    assert interleave(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert interleave(rows.flatten(), 2).tolist() == interleave(rows, 2).flatten().tolist()


def test_llama3_rotary_factors_are_those_of_transformers(tmp_path):
    from transformers import LlamaConfig

    model = save_model(tmp_path, rope_parameters=LLAMA3, head_dim=32)
    tensor = next(t for t in plan_of(model, "gguf", attention=[1]).tensors if t.name == "rope_freqs.weight")
    rates, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(model), "cpu")
    plain = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / torch.tensor(tensor.values), rates, rtol=1e-6)
    assert min(tensor.values) == 1.0 and max(tensor.values) == 8.0 and any(1 < v < 8 for v in tensor.values)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("qwen3", {"head_dim": 8}, "alone, not of a qwen3"),
        ("gemma2", {}, "a gemma2 is not of the families"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("llama", {"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_what_llama_cpp_cannot_say_is_refused(tmp_path, model_type, fields, message):
    source = save_model(tmp_path, **fields) if "head_dim" not in fields else save_model(tmp_path, model_type)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": model_type, **fields}))
    with pytest.raises(ConfigError, match=message):
        plan_of(source, "gguf", attention=[1])


def test_sizes_are_those_of_the_config(llama):
    keys = plan_of(llama, "gguf", attention=[1]).keys
    assert keys["deci.context_length"] == 64 and keys["deci.vocab_size"] == 97
    assert keys["deci.rope.dimension_count"] == keys["deci.attention.key_length"] == 8
    assert math.isclose(keys["deci.attention.layer_norm_rms_epsilon"], 1e-6)
