"""Profile gguf: names, sizes by block, what stands for what is missing, and tokenizers that can be said."""

import json
import math

import pytest
import torch
from export_models import plan_of, save_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from honeloom.dropping.export.gguf_tokenizer import tokenizer_keys
from honeloom.dropping.export.writing import interleave
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
        ("qwen3", {"head_dim": 8}, "a qwen3 is not of the families"),
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


def tokenizer(folder, **changes):
    """Write a tokenizer of a few bytes' worth of merges, changed at some places."""
    words = {f"<0x{b:02X}>": b + 3 for b in range(256)}
    words |= {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 259, "a": 260, "b": 261, "▁a": 262, "ab": 263, "▁ab": 264}
    document = {
        "added_tokens": [{"id": i, "content": c, "special": True} for i, c in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}},
        ]},
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": words,
            "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"], ["▁", "ab"]],
        },
    }  # fmt: skip
    for key, value in changes.items():
        part = document["model"] if key in ("merges", "byte_fallback", "vocab", "ignore_merges") else document
        part[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "chat_template": "{{x}}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer_keys(folder, 266)


def test_a_sentencepiece_like_tokenizer_has_scores_in_the_order_of_its_merges(tmp_path):
    keys, notes = tokenizer(tmp_path)
    assert notes == () and keys["tokenizer.ggml.model"] == "llama"
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    assert (scores["▁a"], scores["ab"], scores["▁ab"]) == (0.0, -1.0, -2.0)
    types = keys["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[3], types[260], types[265]) == (2, 3, 6, 1, 5)
    assert keys["tokenizer.ggml.tokens"][265] == "[PAD265]" and len(types) == 266
    assert keys["tokenizer.ggml.bos_token_id"] == 1 and keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.ggml.add_space_prefix"] is True and keys["tokenizer.chat_template"] == "{{x}}"


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern):
    return sequence({"type": "Split", "pattern": {"Regex": pattern}, "invert": False}, {**BYTES, "use_regex": False})


@pytest.mark.parametrize(
    ("cut", "whole", "name"),
    [
        (BYTES, False, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTES), False, "smollm"),
        (split(LLAMA3_CUT), True, "llama-bpe"),
        (split(LLAMA3_CUT.replace("{1,3}", "")), False, "qwen2"),
    ],
)
def test_ways_to_cut_text_that_have_a_name(tmp_path, cut, whole, name):
    keys, _ = tokenizer(tmp_path, pre_tokenizer=cut, normalizer=None, ignore_merges=whole, byte_fallback=False)
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.merges"][0] == "▁ a"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": split(r"\w+"), "normalizer": None}, "not one of"),
        ({"pre_tokenizer": split(LLAMA3_CUT), "normalizer": None}, "not one of"),  # without ignore_merges
        ({"pre_tokenizer": BYTES, "normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ({"byte_fallback": False}, "no tokens for single bytes"),
        ({"merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]]}, "without a merge of theirs"),
        ({"merges": [["▁a", "b"], ["▁", "a"], ["a", "b"], ["▁", "ab"]]}, "do not follow each other"),
        ({"normalizer": {"type": "Lowercase"}}, "otherwise than sentencepiece"),
        ({"vocab": {"a": 300}}, "ids up to 300"),
    ],
)
def test_a_tokenizer_that_cannot_be_said_leaves_the_file_without_one(tmp_path, changes, reason):
    keys, notes = tokenizer(tmp_path, **changes)
    assert keys["tokenizer.ggml.model"] == "no_vocab" and "tokenizer.ggml.tokens" not in keys
    assert reason in notes[0] and "give token ids" in notes[0]


def test_sizes_are_those_of_the_config(llama):
    keys = plan_of(llama, "gguf", attention=[1]).keys
    assert keys["deci.context_length"] == 64 and keys["deci.vocab_size"] == 97
    assert keys["deci.rope.dimension_count"] == keys["deci.attention.key_length"] == 8
    assert math.isclose(keys["deci.attention.layer_norm_rms_epsilon"], 1e-6)
