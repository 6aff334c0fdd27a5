"""Loading: what does not fit together is refused, not half loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest

from honeloom.backends.hf.load import DEFAULT_MAX_TOKENS, load_config, load_model, token_limit
from honeloom.errors import CheckpointError


@pytest.fixture
def folder(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_layers_that_the_config_leaves_out_are_refused(folder):
    change(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"first 'model\.layers\.1\..*check num_hidden_layers"):
        load_model(folder)


def test_shapes_that_the_config_denies_are_refused(folder):
    change(folder, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight' is \(32, 48\).* asks for \(32, 40\)"):
        load_model(folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama", "num_hidden_layers": "x"}'])
def test_unreadable_config_is_a_clean_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(folder)


def test_code_of_the_repository_is_refused_whatever_its_form(folder):
    change(folder, auto_map="evil.Model")
    with pytest.raises(CheckpointError, match=r"evil\.Model"):
        load_config(folder)


def test_empty_index_is_a_clean_error(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(folder)


def test_adapter_is_never_unpickled(tmp_path, tiny_model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    shutil.copyfile(tiny_model / "model.safetensors", adapter / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        load_model(adapter, base=tiny_model)


def test_long_context_is_used_only_when_asked_for():
    long, short = SimpleNamespace(max_position_embeddings=131072), SimpleNamespace(max_position_embeddings=128)
    assert token_limit(long, None, None) == DEFAULT_MAX_TOKENS == 2048
    assert token_limit(long, None, 8192) == 8192
    assert token_limit(short, None, None) == token_limit(short, None, 8192) == 128
