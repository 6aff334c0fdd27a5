"""Merges that measure their models on rows: the rows count, the files go, and an interrupted one measures once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import honeloom
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.load import load_model, load_tokenizer
from honeloom.backends.hf.measure import MeasuredModel
from honeloom.cli.main import main
from honeloom.errors import ConfigError, HoneloomError, RowsError, SourceError
from honeloom.merging.engine.embeddings import Layout
from honeloom.merging.engine.streaming import Rows
from honeloom.stages import merge as stage
from honeloom.stages import merge_data
from honeloom.stages.merge_data import FOLDER, Measured
from honeloom.stages.row_records import find_row
from honeloom.types.rows import Row, Turn, Where

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model):
    """Two models tuned from one base, each on rows of its own: (model, rows) by name."""
    root = tmp_path_factory.mktemp("tuned")
    texts = {
        "a": [(f"Say {i}.", f"It is {i}.") for i in range(14)],
        "b": [(f"Count to {i}.", f"There were {i} mills and {i + 1} boats.") for i in range(20)],
    }
    found = {}
    for seed, (name, pairs) in enumerate(texts.items()):
        records = [
            {"id": f"{name}{i}", "instruction": q, "input": "", "output": answer} for i, (q, answer) in enumerate(pairs)
        ]
        rows = root / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = {"method": {"type": "full"}, "max_steps": 6, "lr": 3e-3, "batch_size": 4, "seed": seed}
        honeloom.tune(tiny_model, rows=[rows], output_dir=root / name, **settings)
        found[name] = (root / name, rows)
    return found


def recipe(tuned, method, names="ab", **extra):
    """A merge of these models, each with its rows."""
    listed = [{"model": str(tuned[n][0]), "rows": str(tuned[n][1])} for n in names]
    return {"models": listed, "method": method, **extra}


def weights(folder):
    return load_file(folder / "model.safetensors")


def file_bytes(folder):
    return (folder / "model.safetensors").read_bytes()


def encoded(model, rows):
    """Rows as the model reads them, in their order."""
    encoder = Encoder(load_tokenizer(model), 128, train=True)
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    return [
        encoder.encode(
            Row(
                r["id"], "chat", turns=(Turn("user", r["instruction"]), Turn("assistant", r["output"])),
                source="x", where=Where("x", 1),
            )
        )
        for r in records
    ]  # fmt: skip


def squared_gradients(folder, rows):
    """Fisher diagonals straight from autograd, float64."""
    model = load_model(folder)
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    totals = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    items = encoded(folder, rows)
    for item in items:
        labels = torch.tensor([[t if s else -100 for t, s in zip(item.ids, item.scored, strict=True)]])
        loss = model(input_ids=torch.tensor([item.ids]), labels=labels).loss * item.targets
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            totals[name] += gradient.double() ** 2 / len(items)
    return totals


def linear_inputs(folder, rows):
    """Inputs (n, in) of every linear layer, float64."""
    model, seen = load_model(folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, name=name: seen.setdefault(f"{name}.weight", []).append(args[0][0].double())
            )
    with torch.no_grad():
        for item in encoded(folder, rows):
            model(input_ids=torch.tensor([item.ids]))
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def test_fisher_is_the_formula_on_gradients_of_each_models_rows(tuned, tmp_path):
    report = honeloom.merge(recipe(tuned, {"type": "fisher", "eps": 1e-3}), tmp_path / "out")
    merged = weights(tmp_path / "out")
    models = [weights(tuned[n][0]) for n in "ab"]
    fishers = [squared_gradients(*tuned[n]) for n in "ab"]
    for name, tensor in merged.items():
        shares = [f[name] + 1e-3 * f[name].mean() for f in fishers]
        wanted = sum(s * m[name].double() for s, m in zip(shares, models, strict=True)) / sum(shares)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=1e-5)
        assert bool(torch.isfinite(tensor).all())
    tokens = [sum(len(e.ids) for e in encoded(*tuned[n])) for n in "ab"]
    assert report.details["data"] == [
        {"model": str(tuned["a"][0]), "rows": 14, "tokens": tokens[0]},
        {"model": str(tuned["b"][0]), "rows": 20, "tokens": tokens[1]},
    ]
    assert all(check.passed for check in report.verification)
    assert report.warnings == ()


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
def test_the_same_bytes_twice_and_not_those_of_linear(tuned, tmp_path, kind):
    for out, threads in (("one", 1), ("two", 2)):
        honeloom.merge(recipe(tuned, kind, threads=threads), tmp_path / out)
        assert not (tmp_path / out / FOLDER).exists()
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")
    plain = {"models": [str(tuned[n][0]) for n in "ab"]}
    honeloom.merge(plain, tmp_path / "linear")
    other, linear = weights(tmp_path / "one"), weights(tmp_path / "linear")
    moved = [name for name in linear if not torch.allclose(other[name], linear[name], rtol=0, atol=1e-6)]
    if kind == "fisher":
        assert moved == list(linear)
    else:
        assert {n for n in linear if "norm" in n or "embed" in n}.isdisjoint(moved), "what is not linear is averaged"
        assert sum("_proj" in n for n in moved) == 14
        assert HEAD in moved


def test_equal_fishers_give_the_mean(tuned, tmp_path, monkeypatch):
    def ones(model, rows, **_):
        return {name: torch.ones(shape) for name, shape in model.shapes.items()}

    monkeypatch.setattr(merge_data, "fisher_diagonals", ones)
    honeloom.merge(recipe(tuned, "fisher"), tmp_path / "out")
    a, b = (weights(tuned[n][0]) for n in "ab")
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, ((a[name].double() + b[name].double()) / 2).float(), rtol=1e-6, atol=1e-8)


def output_error(merged, models, inputs, name):
    """Sum over models of the mean squared distance between the merged layer's outputs and the model's own."""
    total = 0.0
    for own, x in zip(models, inputs, strict=True):
        gap = x[name] @ (merged[name].double() - own[name].double()).T
        total += float(gap.square().sum()) / len(x[name])
    return total


@pytest.mark.parametrize("shrink", [1.0, 0.9])
def test_regmean_is_nearer_to_all_models_outputs_than_linear(tuned, tmp_path, shrink):
    honeloom.merge(recipe(tuned, {"type": "regmean", "shrink": shrink}), tmp_path / "regmean")
    models, inputs = [weights(tuned[n][0]) for n in "ab"], [linear_inputs(*tuned[n]) for n in "ab"]
    merged = weights(tmp_path / "regmean")
    linear = {name: (models[0][name].double() + models[1][name].double()) / 2 for name in merged}
    for name in inputs[0]:
        near, far = (output_error(w, models, inputs, name) for w in (merged, linear))
        assert 0 < near < far, name
        if shrink == 1:  # the least there is: no step to any side leads lower
            for step in (0.01, -0.01):
                moved = {name: merged[name] + step * (linear[name] - merged[name]).float()}
                assert output_error(moved, models, inputs, name) > near * (1 - 1e-6), name


def test_a_model_with_itself_is_itself(tuned, tmp_path):
    model, _ = tuned["a"]
    for kind in ("fisher", "regmean"):
        report = honeloom.merge(recipe(tuned, kind, "aa"), tmp_path / kind)
        assert len(report.details["data"]) == 1, "one model on the same rows is measured once"
        for name, tensor in weights(tmp_path / kind).items():
            torch.testing.assert_close(tensor, weights(model)[name], rtol=1e-5, atol=1e-6)


def test_slices_measure_each_model_once(tuned, tmp_path, monkeypatch):
    measured = []
    load = MeasuredModel.load.__func__
    monkeypatch.setattr(
        MeasuredModel,
        "load",
        classmethod(lambda cls, source, **k: measured.append(source.name) or load(cls, source, **k)),
    )
    parts = [
        {"sources": [{**s, "layer_range": [i, i + 1]} for s in recipe(tuned, "fisher")["models"]]} for i in range(2)
    ]
    honeloom.merge({"slices": parts, "method": "fisher"}, tmp_path / "slices")
    assert measured == [str(tuned[n][0]) for n in "ab"]
    honeloom.merge(recipe(tuned, "fisher"), tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(tmp_path / "slices").items())


def interrupted(monkeypatch, config, out):
    """A merge that stops once everything is measured."""

    def stop(*_):
        raise HoneloomError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_merged", stop)
        with pytest.raises(HoneloomError, match="stopped"):
            honeloom.merge(config, out)
    (work,) = out.parent.glob(f".{out.name}.partial-*")
    return work / FOLDER


@pytest.mark.parametrize("kind", ["fisher", pytest.param("regmean", marks=pytest.mark.slow)])
def test_a_resumed_merge_measures_no_more(tuned, tmp_path, monkeypatch, kind):
    config, out = recipe(tuned, kind), tmp_path / "out"
    folder = interrupted(monkeypatch, config, out)
    assert sorted(p.name for p in folder.iterdir()) == ["models.0", "models.1"]
    record = json.loads((folder / "models.1" / "measured.json").read_bytes())
    assert (record["rows"], record["settings"]["examples"]) == (20, 256)
    # One record is there, and one measurement was cut off before its record was written.
    (folder / "models.1" / "measured.json").unlink()
    measured = []
    load = MeasuredModel.load.__func__
    monkeypatch.setattr(
        MeasuredModel,
        "load",
        classmethod(lambda cls, source, **k: measured.append(source.name) or load(cls, source, **k)),
    )
    report = honeloom.merge(config, out, resume=True)
    assert measured == [str(tuned["b"][0])]
    assert [d["rows"] for d in report.details["data"]] == [14, 20]
    honeloom.merge(config, tmp_path / "clean")
    assert file_bytes(out) == file_bytes(tmp_path / "clean")


def test_what_was_measured_on_something_else_is_measured_again(tuned, tmp_path, monkeypatch):
    config, out = recipe(tuned, "fisher"), tmp_path / "out"
    folder = interrupted(monkeypatch, config, out)
    file = folder / "models.0" / "measured.json"
    record = json.loads(file.read_bytes())
    file.write_text(json.dumps({**record, "rows": 99, "settings": {**record["settings"], "dtype": "torch.bfloat16"}}))
    report = honeloom.merge(config, out, resume=True)
    assert [d["rows"] for d in report.details["data"]] == [14, 20]


def test_several_passes_change_no_byte(tuned, tmp_path, monkeypatch):
    honeloom.merge(recipe(tuned, "regmean"), tmp_path / "one")
    monkeypatch.setattr(merge_data, "free_memory", lambda device: 0)
    folder = interrupted(monkeypatch, recipe(tuned, "regmean"), tmp_path / "many")
    assert len(list((folder / "models.0").glob("*.safetensors"))) == 9, "two layers of four inputs, and the head"
    honeloom.merge(recipe(tuned, "regmean"), tmp_path / "many", resume=True)
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "many")


def test_rows_are_a_seeded_sample_that_the_lineage_knows(tuned, tmp_path):
    seen = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        report = honeloom.merge(recipe(tuned, {"type": "fisher", "examples": 5}, seed=seed), out)
        assert [d["rows"] for d in report.details["data"]] == [5, 5]
        ids = pq.read_table(out / "calibration_rows.parquet")["id"].to_pylist()
        assert len(ids) == 10
        seen.append(ids)
        assert find_row(out, ids[0]) == "calibrated on"
    assert set(seen[0]) != set(seen[1])
    assert file_bytes(tmp_path / "0") != file_bytes(tmp_path / "1")


def test_rows_that_cannot_be_used_are_counted(tuned, tmp_path):
    model, rows = tuned["a"]
    broken = tmp_path / "broken.jsonl"
    lines = rows.read_text().splitlines()[:3]
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    nothing = {"messages": turns}  # the template knows no system
    long = {"instruction": "x " * 400, "input": "", "output": "y"}  # cut before its answer
    broken.write_text("\n".join([*lines, "{not json", json.dumps(nothing), json.dumps(long)]) + "\n")
    config = recipe(tuned, "fisher")
    config["models"][0]["rows"] = str(broken)
    report = honeloom.merge(config, tmp_path / "out")
    assert report.details["data"][0]["rows"] == 3
    told = "\n".join(report.warnings)
    assert "1 of 6 rows left out (1 unreadable)" in told
    assert f"{model}: 2 of 5 rows have nothing to train within 128 tokens; left out" in told
    broken.write_text(json.dumps(long) + "\n")
    with pytest.raises(RowsError, match=r"models\.0\.rows: none of the 1 rows has anything to train within 128 tokens"):
        honeloom.merge(config, tmp_path / "none")


def test_every_model_needs_rows(tuned, tmp_path):
    config = recipe(tuned, "regmean")
    del config["models"][1]["rows"]
    with pytest.raises(ConfigError, match=r"models\.1\.rows: regmean measures each model on rows of its own domain"):
        honeloom.merge(config, tmp_path / "out")
    base = {**config, "base_model": str(tuned["b"][0])}
    with pytest.raises(ConfigError, match=r"models\.1\.rows: regmean measures each model on rows of its own domain"):
        honeloom.merge(base, tmp_path / "out")
    config = recipe(tuned, "fisher")
    config["models"][1]["rows"] = str(tmp_path / "absent.jsonl")
    with pytest.raises(SourceError, match=r"absent\.jsonl"):
        honeloom.merge(config, tmp_path / "out")


def test_a_model_without_tokenizer_cannot_read_rows(tuned, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tuned["a"][0] / name, bare / name)
    config = recipe(tuned, "fisher")
    config["models"][0]["model"] = str(bare)
    with pytest.raises(SourceError, match=r"bare: no tokenizer, so it cannot be measured on rows; add tokenizer\.json"):
        honeloom.merge(config, tmp_path / "out")


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
def test_a_memory_limit_below_the_model_is_refused_before_it_is_loaded(tuned, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(merge_data, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(MeasuredModel, "load", None)
    count = sum(t.numel() for t in weights(tuned["a"][0]).values())
    least = 1000 + 4 * count + (4 * count if kind == "fisher" else 4 * 48**2)
    with pytest.raises(
        ConfigError, match=rf"max_memory {least - 1:,}: measuring .*a on its rows takes at least {least:,}"
    ):
        honeloom.merge(recipe(tuned, kind, max_memory=least - 1), tmp_path / "out")


def test_a_dry_run_measures_nothing(tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MeasuredModel, "load", None)
    file = tmp_path / "merge.yaml"
    file.write_text(json.dumps(recipe(tuned, "fisher")))
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(file), str(tmp_path / "out"), "--dry-run"])
    assert ended.value.code == 0
    assert "models.1.rows.0" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["merge.yaml"]


def test_an_adapter_is_measured_on_its_base(tuned, tmp_path, tiny_model):
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    whole = PeftModel.from_pretrained(load_model(tiny_model), tmp_path / "adapter").merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path / "whole" / file)
    merged = {}
    for name in ("adapter", "whole"):
        config = recipe(tuned, "fisher")
        config["models"][1]["model"] = f"{tiny_model}+{tmp_path / name}" if name == "adapter" else str(tmp_path / name)
        honeloom.merge(config, tmp_path / f"merged-{name}")
        merged[name] = weights(tmp_path / f"merged-{name}")
    for name, tensor in merged["whole"].items():
        torch.testing.assert_close(merged["adapter"][name], tensor, rtol=1e-4, atol=1e-5)


def swapped(folder, target, one, two):
    """The same model with the ids of two tokens exchanged."""
    shutil.copytree(folder, target)
    document = json.loads((target / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab[one], vocab[two] = i, j = vocab[two], vocab[one]
    (target / "tokenizer.json").write_text(json.dumps(document))
    tensors = weights(folder)
    for name in ("model.embed_tokens.weight", HEAD):
        moved = tensors[name].clone()
        moved[[i, j]] = tensors[name][[j, i]]
        tensors[name] = moved
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "manifest.json").unlink(missing_ok=True)
    return target


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
def test_tokens_in_another_order_change_nothing(tuned, tmp_path, kind):
    """Merging by token what has its rows elsewhere is merging what has them in place."""
    model, rows = tuned["b"]
    other = {"b": (swapped(model, tmp_path / "swapped", "m", "b"), rows), "a": tuned["a"]}
    honeloom.merge(recipe(tuned, kind), tmp_path / "plain")
    honeloom.merge(recipe(other, kind, tokenizer="base"), tmp_path / "matched")
    plain, matched = weights(tmp_path / "plain"), weights(tmp_path / "matched")
    for name, tensor in plain.items():
        torch.testing.assert_close(matched[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_row_that_is_not_a_models_own_has_no_fisher():
    """Three tokens; the second model has them in the order 2, 0 and lacks the last, which it takes from the first."""
    owner, index = np.array([[0, 0, 0], [1, 1, 0]]), np.array([[0, 1, 2], [1, 0, 2]])
    own = np.array([[0, 1, 2], [1, 0, -1]])
    layout = Layout(("x", "y"), 3, 3, (3, 2), owner, index, own, 0, ())
    tables = {"models.0": torch.arange(1.0, 7.0).double(), "models.1": torch.arange(10.0, 50.0, 10).double()}
    data = {
        place: {
            "embed": lambda start, stop, t=table: t[start:stop],
            "norm": lambda start, stop: torch.ones(stop - start),
        }
        for place, table in tables.items()
    }
    measured = Measured("fisher", data, (), ())
    names = {"models.0": Named("x"), "models.1": Named("y")}
    found = measured.in_order({"embed": Rows((3, 2), ())}, layout, names)
    assert found["models.0"]["embed"](0, 6).tolist() == [1, 2, 3, 4, 5, 6]
    assert found["models.1"]["embed"](0, 6).tolist() == [30, 40, 10, 20, 0, 0]
    assert found["models.1"]["embed"](1, 5).tolist() == [40, 10, 20, 0]
    assert found["models.1"]["norm"] is data["models.1"]["norm"]
    assert replace(measured, kind="gram").in_order({"embed": Rows((3, 2), ())}, layout, names) is data


class Named:
    """What is asked of a source."""

    def __init__(self, name):
        self.name = name


def test_a_method_without_data_measures_nothing(tuned, tmp_path):
    report = honeloom.merge({"models": [str(tuned[n][0]) for n in "ab"]}, tmp_path / "out")
    assert "data" not in report.details
    assert not (tmp_path / "out" / "calibration_rows.parquet").exists()
