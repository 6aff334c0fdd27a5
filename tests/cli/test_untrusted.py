"""Model folders from strangers: no pickle is opened, no code is run, and offline a hub id fails at once."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest

from honeloom.errors import SourceError
from honeloom.stages.inputs import resolve_model


class Canary:
    """Unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def model(tmp_path, tiny_model):
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_the_canary_sings(tmp_path, canary):
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "consolidated.00.pth"])
def test_a_folder_of_pickled_weights_is_refused_unread(cli, rows, model, canary, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Canary(canary)))
    done = cli("evaluate", model, "--rows", rows)
    assert done.code == 2
    assert f"{name} is pickled, and pickles may hold code: honeloom never reads them" in done.err
    assert not canary.exists()


def test_pickles_beside_safetensors_stay_closed(cli, rows, model, canary):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Canary(canary)))
    assert cli("evaluate", model, "--rows", rows).code == 0
    assert not canary.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_repository_is_never_imported(cli, rows, model, canary, file):
    code = f"open({str(canary)!r}, 'w').close()\n"
    for module in ("modeling_stranger", "tokenization_stranger"):
        (model / f"{module}.py").write_text(code)
    settings = json.loads((model / file).read_text())
    settings["auto_map"] = {
        "AutoConfig": "modeling_stranger.Config",
        "AutoModelForCausalLM": "modeling_stranger.Model",
        "AutoTokenizer": ["tokenization_stranger.Tokenizer", None],
    }
    (model / file).write_text(json.dumps(settings))
    done = cli("evaluate", model, "--rows", rows)
    if file == "config.json":
        assert done.code == 2
        assert "auto_map asks to run code from the repository" in done.err
    assert not canary.exists()
    assert not [name for name in sys.modules if "stranger" in name]


def test_offline_a_hub_id_fails_at_once_and_names_repository_and_file(cli, rows, monkeypatch):
    import huggingface_hub  # noqa: F401 - its import is not the work that is timed

    def no_network(*_, **__):
        raise AssertionError("offline, nothing is asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    started = time.process_time()
    done = cli("evaluate", "nobody-here/absent-model@main", "--rows", rows)
    assert time.process_time() - started < 2
    assert done.code == 2
    assert "nobody-here/absent-model@main: there is no such folder, config.json is not in the local cache" in done.err
    assert "HF_HUB_OFFLINE is set" in done.err
    plan = json.loads(cli("evaluate", "nobody-here/absent-model", "--rows", rows, "--dry-run", "--json").out)
    assert plan["stages"][0]["downloads"] == ["nobody-here/absent-model"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped header", "missing shard"])
def test_damaged_weights_are_named_before_they_are_loaded(cli, rows, model, damage):
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    changed = {
        "truncated": data[:-100],
        "empty": b"",
        "flipped header": bytes([data[0] ^ 0xFF]) + data[1:],
        "missing shard": data,
    }[damage]
    weights.write_bytes(changed)
    if damage == "missing shard":
        weights.rename(model / "model-00001-of-00009.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00009-of-00009.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    done = cli("evaluate", model, "--rows", rows)
    assert done.code == 2
    assert ("model-00009-of-00009" if damage == "missing shard" else "model.safetensors") in done.err


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 16)

    def write(text: str) -> Path:
        (folder / "adapter_config.json").write_text(text)
        return folder

    return write


def test_an_adapter_s_base_is_found_or_refused_by_name(adapter, model, tmp_path):
    folder = adapter(json.dumps({"base_model_name_or_path": str(model)}))
    assert resolve_model(str(folder)).base == model
    first = resolve_model(str(folder)).fingerprint
    (model / "generation_config.json").write_text("{}")
    assert resolve_model(str(folder)).fingerprint != first
    with pytest.raises(SourceError, match="is an adapter too"):
        resolve_model(str(adapter(json.dumps({"base_model_name_or_path": str(folder)}))))
    with pytest.raises(SourceError, match="holds a list, not an object"):
        resolve_model(str(adapter("[]")))
    with pytest.raises(SourceError, match="not JSON"):
        resolve_model(str(adapter("{")))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"inputs": 3}', '{"schema": "other/1", "inputs": [1]}'])
def test_an_inputs_file_of_another_tool_is_ignored(cli, rows, model, adapter, text):
    (model / "inputs.json").write_text(text)
    assert cli("evaluate", model, "--rows", rows).code == 0
    folder = adapter(json.dumps({"base_model_name_or_path": str(model)}))
    (folder / "inputs.json").write_text(text)
    assert resolve_model(str(folder)).base == model


def test_the_fingerprint_is_of_content_not_of_place_or_time(model, tiny_model):
    assert resolve_model(str(model)).fingerprint == resolve_model(str(tiny_model)).fingerprint
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert resolve_model(str(model)).fingerprint != resolve_model(str(tiny_model)).fingerprint
