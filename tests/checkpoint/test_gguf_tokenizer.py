"""Tokenizers that GGUF metadata can say, and those that it cannot."""

import json

import pytest

from honeloom.checkpoint.gguf.tokenizer import tokenizer_keys


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
