"""What may be merged with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig

from honeloom.checkpoint.headers import TensorInfo
from honeloom.errors import IncompatibleModelsError
from honeloom.merging.compatibility import check_compatible, compare_tokenizers

CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48).to_dict()
TENSORS = {"w": TensorInfo("w", "F32", (2, 3), 0, 24)}


def check(changes: dict, tensors=None) -> None:
    check_compatible({"one": CONFIG, "two": {**CONFIG, **changes}}, {"one": TENSORS, "two": tensors or TENSORS})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_size", 64),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 2),
        ("head_dim", 16),
        ("intermediate_size", 64),
        ("vocab_size", 7),
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("sliding_window", 128),
        ("rope_parameters", {"rope_theta": 500000.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8}),
    ],
)
def test_every_difference_is_named(field, value):
    with pytest.raises(IncompatibleModelsError) as caught:
        check({field: value})
    message = str(caught.value)
    assert "one" in message
    assert "two" in message
    assert field in message
    assert str(CONFIG.get(field)) in message or field in ("num_key_value_heads", "head_dim", "sliding_window")


def test_what_may_differ():
    check({"_name_or_path": "x", "bos_token_id": 5, "dtype": "float16", "use_cache": False, "architectures": None})


def test_old_and_new_ways_to_write_rope():
    new = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    old = {"rope_theta": 10000, "rope_scaling": None}
    scaled = {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2}}
    plain = {k: v for k, v in CONFIG.items() if k != "rope_parameters"}
    tensors = {"one": TENSORS, "two": TENSORS}
    check_compatible({"one": plain | new, "two": plain | old}, tensors)
    check_compatible(
        {
            "one": plain | scaled,
            "two": plain | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        },
        tensors,
    )
    with pytest.raises(IncompatibleModelsError, match="rope_parameters"):
        check_compatible({"one": plain | new, "two": plain | scaled}, tensors)


def test_nested_text_configurations_count():
    one = {"model_type": "gemma3", "text_config": CONFIG}
    two = {"model_type": "gemma3", "text_config": {**CONFIG, "hidden_size": 64}}
    with pytest.raises(IncompatibleModelsError, match="hidden_size is 32 and 64"):
        check_compatible({"one": one, "two": two}, {"one": TENSORS, "two": TENSORS})


def test_quantised_models():
    with pytest.raises(IncompatibleModelsError, match="two is quantised"):
        check({"quantization_config": {"bits": 4}})


def test_tensor_names_and_shapes():
    with pytest.raises(IncompatibleModelsError, match="two has the tensor 'x' and one has not"):
        check({}, {**TENSORS, "x": TENSORS["w"]})
    with pytest.raises(IncompatibleModelsError, match=r"'w' has shape \(2, 3\) and \(3, 2\)"):
        check({}, {"w": TensorInfo("w", "F32", (3, 2), 0, 24)})


def tokenizer(folder: Path, vocab: dict[str, int], template: str | None = None) -> Path:
    folder.mkdir()
    Tokenizer(WordLevel({**vocab, "<unk>": 99}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return folder


def compare(*folders: Path, by_token: bool = False, template_chosen: bool = False) -> list[str]:
    return compare_tokenizers({f.name: f for f in folders}, by_token=by_token, template_chosen=template_chosen)


def test_equal_ids_of_different_tokens_are_refused(tmp_path):
    one, two = tokenizer(tmp_path / "one", {"a": 0, "b": 1}), tokenizer(tmp_path / "two", {"b": 0, "a": 1})
    with pytest.raises(IncompatibleModelsError, match="token id 0 is 'a' and 'b'; set tokenizer: base or"):
        compare(one, two)
    assert compare(one, two, by_token=True) == []


def test_a_token_that_one_has_alone_is_told(tmp_path):
    one, two = tokenizer(tmp_path / "one", {"a": 0}), tokenizer(tmp_path / "two", {"a": 0, "c": 2})
    [word] = compare(one, two)
    assert "the tokenizers of one and two differ: 1 tokens are in one of them alone (first 'c')" in word


def test_different_templates_must_be_chosen_between(tmp_path):
    one, two = tokenizer(tmp_path / "one", {"a": 0}, "A"), tokenizer(tmp_path / "two", {"a": 0}, "B")
    with pytest.raises(IncompatibleModelsError, match=r"one, two differ.*chat_template: auto \(that of one\)"):
        compare(one, two)
    [word] = compare(one, two, template_chosen=True)
    assert "differ" in word


def test_a_donor_without_the_others_template_is_told(tmp_path):
    one, two = tokenizer(tmp_path / "one", {"a": 0}), tokenizer(tmp_path / "two", {"a": 0}, "B")
    [word] = compare(one, two)
    assert "to keep it, set chat_template: two" in word


def test_folders_without_a_tokenizer_are_passed_over(tmp_path):
    (tmp_path / "none").mkdir()
    assert compare(tmp_path / "none") == []
    assert compare(tmp_path / "none", tokenizer(tmp_path / "one", {"a": 0})) == []


def test_fields_that_a_user_lets_differ():
    changes = {"rms_norm_eps": 1e-4}
    with pytest.raises(IncompatibleModelsError, match=r"set accept: \[rms_norm_eps\]"):
        check(changes)
    check_compatible({"one": CONFIG, "two": {**CONFIG, **changes}}, {"one": TENSORS, "two": TENSORS},
                     accept=["rms_norm_eps"])  # fmt: skip


def test_rows_of_tokens_may_differ_in_number():
    more = {"w": TensorInfo("w", "F32", (5, 3), 0, 60)}
    with pytest.raises(IncompatibleModelsError, match="if these are rows of tokens, set tokenizer"):
        check({}, more)
    check_compatible({"one": CONFIG, "two": {**CONFIG, "vocab_size": 5}}, {"one": TENSORS, "two": more}, by_token=["w"])
