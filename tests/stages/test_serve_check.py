"""`serve-check`: what counts as the same, as a near tie and as an error; with and without llama.cpp."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import honeloom
from honeloom.backends.llama_cpp import Answer, ask_llama_cpp
from honeloom.cli.main import main
from honeloom.errors import (
    ConfigError,
    HoneloomError,
    IncompatibleModelsError,
    MissingExtraError,
    SourceError,
    VerificationError,
)
from honeloom.stages.serve_check import _compare, table


@pytest.fixture(scope="module")
def served(stories260k, tmp_path_factory):
    """A real model's export."""
    out = tmp_path_factory.mktemp("served") / "out"
    honeloom.export(stories260k, out)
    return out


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32)


SOURCE = logits([0, 5, 0], [0, 3, 1], [2, 1.9, 0], [0, 0, 9])
"""One prompt token, then three that the source writes: 1, 1, 0, 2 would follow."""


@pytest.mark.parametrize(
    ("found", "served", "verdict"),
    [
        ([1, 1, 0, 2], SOURCE, None),
        ([1, 1, 1, 2], SOURCE + logits([0.1, 0, 0], [0, 0, 0], [0, 0.2, 0], [0, 0, 0]), True),
        ([1, 1, 1, 2], SOURCE + logits([0.01, 0, 0], [0, 0, 0], [0, 0.2, 0], [0, 0, 0]), False),
        ([1, 2, 0, 2], SOURCE + logits([0.9, 0, 0], [0, 0, 3], [0, 0, 0], [0, 0, 0]), False),
    ],
)
def test_a_difference_is_a_near_tie_only_where_errors_elsewhere_explain_it(found, served, verdict):
    """The margin is 0.1 at the third token and 2 at the second; the place itself explains nothing."""
    compared = _compare("p", 1, [1, 1, 0, 2], found, SOURCE, served, rounded=True)
    assert compared.near_tie is verdict
    if verdict is None:
        assert compared.first_difference is None
        return
    assert compared.first_difference == (2 if found[1] == 1 else 1)
    assert compared.margin == pytest.approx(0.1 if found[1] == 1 else 2, abs=1e-6)
    assert _compare("p", 1, [1, 1, 0, 2], found, SOURCE, served, rounded=False).near_tie is False


def test_transformers_against_itself_is_the_same(stories260k, tmp_path):
    report = honeloom.serve_check(stories260k, against=stories260k, tokens=6)
    assert report.status == "ok" and report.details["kl"] < 1e-9 and report.details["runtime"] == "transformers"
    assert [len(p["found"]) for p in report.details["prompts"]] == [6, 6, 6]
    columns, rows = table(report)
    assert columns[0] == "prompt" and [row[1:3] for row in rows] == [["6 of 6", "same"]] * 3


def test_other_weights_fail_with_3_and_one_document(stories260k, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(stories260k, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= -1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        main(["serve-check", str(changed), "--against", str(stories260k), "--tokens", "4", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == 3 and document["status"] == "failed" and document["verb"] == "serve-check"
    assert not document["verification"][0]["passed"]


@pytest.fixture
def no_llama(monkeypatch):
    """llama.cpp counts as installed, and answers what it is told."""
    monkeypatch.setattr("honeloom.stages.serve_check.llama_python", lambda: "python")

    def answer(change):
        def ask(file, *, rows, prompts, tokens):
            from honeloom.backends.gguf_model import GgufModel

            model = GgufModel(file)
            found = [part.numpy() for part in model.row_logits(rows)]
            greedy = [[int(t) for t in part[len(p) - 1 :].argmax(-1)] for p, part in zip(prompts, found, strict=True)]
            return change(Answer(found, [], greedy, [], None, 0, "0"))

        monkeypatch.setattr("honeloom.stages.serve_check.ask_llama_cpp", ask)

    return answer


def test_an_export_finds_its_source(served, stories260k, no_llama, tmp_path):
    no_llama(lambda answer: answer)
    for target in (served, served / "model.gguf"):
        report = honeloom.serve_check(target, tokens=8)
        assert report.status == "ok" and report.details["type"] == "F16" and 0 < report.details["kl"] < 1e-4
        assert report.details["source"] == str(stories260k)


def test_a_token_that_is_no_near_tie_fails(served, no_llama, capsys):
    def change(answer):
        return Answer(answer.rows, [], [[0] * len(row) for row in answer.greedy], [], None, 0, "0")

    no_llama(change)
    report = honeloom.serve_check(served, tokens=4)
    assert report.status == "failed" and [c.passed for c in report.verification] == [True, False]
    entry = report.details["prompts"][0]
    assert entry["first_difference"] == 0 and entry["margin"] > 1 and entry["near_tie"] is False


def test_logits_beyond_rounding_fail(served, no_llama):
    def change(answer):
        rows = [row + np.sin(np.arange(row.shape[1], dtype=np.float32)) for row in answer.rows]
        return Answer(rows, [], answer.greedy, [], None, 0, "0")

    no_llama(change)
    report = honeloom.serve_check(served, tokens=4)
    assert [c.passed for c in report.verification] == [False, True]


def test_bad_input_says_what_to_do(served, stories260k, tiny_model, no_llama, tmp_path, monkeypatch):
    no_llama(lambda answer: answer)
    with pytest.raises(ConfigError, match="give the source with --against"):
        honeloom.serve_check(stories260k)
    with pytest.raises(ConfigError, match=r"honeloom export .* OUT"):
        honeloom.serve_check(stories260k, runtime="llama.cpp")
    with pytest.raises(ConfigError, match=r"which runs in llama\.cpp"):
        honeloom.serve_check(served, runtime="transformers")
    with pytest.raises(ConfigError, match=r"known are llama\.cpp and transformers"):
        honeloom.serve_check(served, runtime="vllm")
    with pytest.raises(ConfigError, match="at least 1"):
        honeloom.serve_check(served, tokens=0)
    with pytest.raises(IncompatibleModelsError, match="a vocabulary of 512 tokens"):
        honeloom.serve_check(served, against=tiny_model)
    with pytest.raises(IncompatibleModelsError, match="give --against the model"):
        honeloom.serve_check(tiny_model, against=stories260k)
    with pytest.raises(SourceError, match="no such folder"):
        honeloom.serve_check(tmp_path / "nothing", against=stories260k)
    record = json.loads((served / "inputs.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(served, copy)
    record["inputs"][0]["sha256"] = "0" * 64
    (copy / "inputs.json").write_text(json.dumps(record))
    with pytest.raises(SourceError, match="its content changed"):
        honeloom.serve_check(copy)


def test_without_llama_cpp_the_install_is_named(served, monkeypatch, tmp_path):
    monkeypatch.delenv("HONELOOM_LLAMA_PYTHON", raising=False)
    find = importlib.util.find_spec
    absent = ("llama_cpp", "cyllama")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'honeloom\[serve\]'.*HONELOOM_LLAMA_PYTHON"):
        honeloom.serve_check(served)
    monkeypatch.setenv("HONELOOM_LLAMA_PYTHON", str(tmp_path / "python"))
    with pytest.raises(MissingExtraError, match="there is no such file"):
        honeloom.serve_check(served)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("exit 1", VerificationError, "cannot run"),
        ("echo \"ModuleNotFoundError: No module named 'llama_cpp'\" >&2; exit 1", MissingExtraError, "-m pip install"),
        ("kill -4 $$", HoneloomError, "killed by signal 4"),
    ],
)
def test_a_runtime_that_fails_is_told_apart(script, error, message, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setenv("HONELOOM_LLAMA_PYTHON", str(python))
    with pytest.raises(error, match=message):
        ask_llama_cpp(tmp_path / "x.gguf", rows=[[1]])


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["base6m", "stories260k", "babyllama105"])
@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_real_models_in_llama_cpp(name, quant, shared_data, tmp_path, llama_cpp):
    honeloom.export(shared_data / "models" / name, tmp_path / "out", quant=quant)
    report = honeloom.serve_check(tmp_path / "out")
    assert report.status == "ok" and report.details["runtime"] == "llama.cpp"
    assert sum(p["first_difference"] is None for p in report.details["prompts"]) >= (3 if quant == "f16" else 2)


@pytest.mark.llama_cpp
def test_a_damaged_file_is_refused_by_llama_cpp(served, stories260k, tmp_path, llama_cpp):
    file = tmp_path / "model.gguf"
    file.write_bytes((served / "model.gguf").read_bytes()[:-40_000])
    with pytest.raises((VerificationError, HoneloomError, ValueError)):
        honeloom.serve_check(file, against=stories260k)
