"""`export`: real and tiny models to GGUF, what is verified, and bad input."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import honeloom
from honeloom.backends.gguf import GgufFile
from honeloom.backends.gguf_model import GgufModel
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.checkpoint.gguf.quant import FILE_TYPES
from honeloom.errors import ConfigError, InputError, OutOfSpaceError, OutputExistsError, VerificationError
from honeloom.runs.manifest import load_manifest
from honeloom.stages.export_source import open_export
from honeloom.stages.publish import _files

SIDE = {"report.json", "recipe.lock.yaml", "inputs.json", "environment.json", "events.jsonl", "README.md"}


@pytest.fixture(scope="module")
def stories(stories260k, tmp_path_factory):
    """A real model of float32 weights, exported once."""
    out = tmp_path_factory.mktemp("export") / "stories"
    return honeloom.export(stories260k, out)


def test_a_real_model_becomes_one_file_that_is_checked(stories, stories260k):
    out = stories.out
    report = json.loads((Path(out) / "report.json").read_text())
    assert report["artefact"]["kind"] == "gguf" and report["artefact"]["path"] == f"{out}/model.gguf"
    names = {p.name for p in Path(out).iterdir()}
    assert SIDE | {"model.gguf", "manifest.json"} <= names and "config.json" not in names
    assert stories.status == "ok" and len(stories.verification) == 4
    assert 0 < stories.metric("kl").value < 1e-5 and stories.metric("logits_gap").value < 0.05
    details = stories.details
    assert (details["architecture"], details["quant"], details["vocabulary"]) == ("llama", "f16", "llama")
    assert details["bytes"] < 0.6 * details["bytes_source"] and details["kept_f16"] == []
    assert GgufFile(Path(out) / "model.gguf").get("general.file_type") == FILE_TYPES["F16"]
    assert honeloom.verify(out).status == "ok"


def test_the_same_call_again_is_reused_and_another_needs_overwrite(stories, stories260k):
    assert honeloom.export(stories260k, stories.out).reused
    with pytest.raises(OutputExistsError):
        honeloom.export(stories260k, stories.out, quant="q8_0")


def test_eight_bits_with_rows_that_blocks_do_not_divide(stories260k, tmp_path):
    report = honeloom.export(stories260k, tmp_path / "out", quant="q8_0")
    assert len(report.details["kept_f16"]) == 5 and report.details["kept_f16"][0] == "blk.0.ffn_down.weight"
    assert report.metric("kl").value < 2e-3 and len(report.verification) == 3
    assert GgufFile(tmp_path / "out" / "model.gguf").get("general.file_type") == FILE_TYPES["Q8_0"]


def test_bf16_weights_are_held_exactly_and_the_template_goes_along(shared_data, tmp_path):
    report = honeloom.export(shared_data / "models" / "base6m", tmp_path / "out")
    assert report.metric("logits_gap").value < 1e-4 and abs(report.metric("kl").value) < 1e-8
    assert report.details["chat_template"] and "3 conversations" in report.verification[-1].claim
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- gguf" in card and "library_name" not in card
    pushed = dict(_files(tmp_path / "out", load_manifest(tmp_path / "out")))
    assert pushed["model.gguf"] == tmp_path / "out" / "model.gguf" and "README.md" in pushed


def test_a_tokenizer_that_cannot_be_said_is_told(shared_data, tmp_path):
    report = honeloom.export(shared_data / "models" / "babyllama105", tmp_path / "out")
    assert report.details["vocabulary"] == "no_vocab" and any("token ids" in w for w in report.warnings)
    assert any("no tokens for single bytes" in note for note in report.details["notes"])


def test_a_model_without_tokenizer_is_compared_on_seeded_ids(tiny_model, tmp_path):
    source = tmp_path / "bare"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, source / name)
    report = honeloom.export(source, tmp_path / "out", quant="q8_0")
    assert "seeded token ids" in report.verification[0].claim and len(report.verification) == 2
    assert report.details["kept_f16"]  # 48 is no multiple of 32


def make(kind, folder, **fields):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **fields}))
    model.save_pretrained(folder)
    return folder


def test_a_mixture_written_by_mix_is_exported(tiny_model, other_model, tmp_path):
    """Level ffn gives a plain Mixtral, whose experts llama.cpp's architecture llama holds."""
    config = {
        "base_model": str(tiny_model), "experts": [{"model": str(m)} for m in (tiny_model, other_model)],
        "router": {"type": "random"}, "level": "ffn",
    }  # fmt: skip
    honeloom.mix(config, tmp_path / "mixed")
    report = honeloom.export(tmp_path / "mixed", tmp_path / "out")
    file = GgufFile(tmp_path / "out" / "model.gguf")
    assert report.details["architecture"] == "llama" and file.get("llama.expert_count") == 2
    assert "blk.1.ffn_gate_exps.weight" in file and "blk.0.ffn_gate_inp.weight" in file


def test_a_dropped_model_is_exported(stories260k, tmp_path):
    honeloom.drop(stories260k, tmp_path / "drop", layers={"attention": [2]}, profile="dropped", calibration="lab:dev",
                  samples=2)  # fmt: skip
    report = honeloom.export(tmp_path / "drop", tmp_path / "out")
    assert report.details["architecture"] == "deci" and any("flash" in note for note in report.details["notes"])


def test_in_a_recipe(tiny_model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nstages:\n  tuned: {{tune: {{model: {tiny_model}, rows: 'lab:dev', limit: 8, max_steps: 1, "
        "method: {type: full}, lr: 1e-4}}\n  served: {export: {model: $tuned, quant: q8_0}}\n"
    )
    report = honeloom.run(recipe, output_dir=tmp_path / "run")
    assert [s["verb"] for s in report.details["stages"]] == ["tune", "export"]
    assert (tmp_path / "run" / "stages" / "2-served" / "model.gguf").is_file()


def test_the_plan_tells_size_and_refusals_without_weights(stories260k, tmp_path, stories):
    (plan,) = honeloom.plan("export", model=str(stories260k), quant="f16")
    told = plan.notes[0]
    assert "architecture llama" in told and "0.52 MB" in told and plan.needs.parameters > 250_000
    written = (Path(stories.out) / "model.gguf").stat().st_size
    assert abs(plan.needs.disk_bytes - 64 * 2**20 - written) < 20_000
    (plan,) = honeloom.plan("export", model=str(make("gemma2", tmp_path / "gemma", head_dim=8)))
    assert "would be refused" in plan.notes[0] and plan.needs.unknown


def test_bad_input_says_what_to_do(tiny_model, stories260k, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"quant.*'f16' or 'q8_0'"):
        honeloom.export(tiny_model, tmp_path / "o", quant="q4_k")
    with pytest.raises(ConfigError, match=r"a gemma2 cannot be exported: gguf takes llama, mistral"):
        honeloom.export(make("gemma2", tmp_path / "gemma", head_dim=8), tmp_path / "o")
    honeloom.tune(tiny_model, "lab:dev", limit=4, max_steps=1, lr=1e-4, output_dir=tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"is an adapter.*honeloom aggregate .*--into-base"):
        honeloom.export(tmp_path / "adapter", tmp_path / "o")
    with pytest.raises(ConfigError, match="is an adapter"):
        honeloom.export(f"{tiny_model}+{tmp_path / 'adapter'}", tmp_path / "o")
    mixture = tmp_path / "mixture"
    mixture.mkdir()
    (mixture / "config.json").write_text('{"model_type": "honeloom_mixture"}')
    with pytest.raises(InputError, match="level: ffn"):
        honeloom.export(mixture, tmp_path / "o")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(OutOfSpaceError):
        honeloom.export(stories260k, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_without_the_package_the_extra_is_named(tiny_model, monkeypatch, tmp_path):
    from honeloom.errors import MissingExtraError
    from honeloom.stages.inputs import resolve_model

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'honeloom\[gguf\]'"):
        open_export(resolve_model(str(tiny_model)))


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_a_file_that_is_not_the_model_is_not_published(quant, stories260k, tmp_path, monkeypatch):
    """Rotary pairs left as transformers has them: the claim fails, and nothing appears."""
    monkeypatch.setattr("honeloom.checkpoint.export_content.interleave", lambda rows, heads: rows)
    with pytest.raises(VerificationError, match="mean KL divergence"):
        honeloom.export(stories260k, tmp_path / "out", quant=quant)
    assert not (tmp_path / "out").exists()


def test_a_model_that_predicts_nothing_has_logits_all_the_same(tiny_model, tmp_path, monkeypatch):
    """Random weights give no divergence to speak of; one token, shifted by a sixth of their spread, is seen."""
    monkeypatch.setattr("honeloom.backends.gguf_model.GgufModel.row_logits", spoilt(GgufModel.row_logits))
    with pytest.raises(VerificationError, match="over their spread"):
        honeloom.export(tiny_model, tmp_path / "out")


def spoilt(row_logits):
    def shifted(self, rows):
        first, *others = row_logits(self, rows)
        return [first + 0.02 * torch.nn.functional.one_hot(torch.tensor(5), first.shape[1]), *others]

    return shifted


def test_a_vocabulary_that_cuts_otherwise_is_not_published(shared_data, tmp_path, monkeypatch):
    """Spaces before text that the tokenizer does not put there."""
    source = tmp_path / "source"
    source.mkdir()
    origin = shared_data / "models" / "stories260k"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(origin / name, source / name)
    copy_tokenizer(origin, source)
    monkeypatch.setattr("honeloom.checkpoint.gguf.tokenizer._prefix", lambda document: False)
    with pytest.raises(VerificationError, match="cuts otherwise"):
        honeloom.export(source, tmp_path / "out")
