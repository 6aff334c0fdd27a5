"""What may be merged with what."""

from __future__ import annotations

import json

import pytest
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
        ("tie_word_embeddings", True),
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


def test_tokenizers(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "same", "other", "template", "none")}
    for name, folder in folders.items():
        folder.mkdir()
        if name != "none":
            (folder / "tokenizer.json").write_text("other" if name == "other" else "x")
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "A"}))
    (folders["template"] / "chat_template.jinja").write_text("B")
    (folders["same"] / "chat_template.jinja").write_text("A")
    warnings = compare_tokenizers(folders)
    assert [w.split(";")[0] for w in warnings] == [
        "one and other have different tokenizers",
        "one and template have different chat templates",
    ]
    assert compare_tokenizers({"none": folders["none"]}) == []
