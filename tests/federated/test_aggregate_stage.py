"""`aggregate` on PEFT adapters of tiny models: PEFT is the oracle for what is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings

import pytest
import torch
from adapter_folders import (
    CONFIG,
    WEIGHTS,
    edit_json,
    edit_weights,
    logits,
    logits_of,
    make_adapter,
    merged_weights,
    open_base,
    summed_logits,
    summed_weights,
)
from peft import PeftModel
from safetensors.torch import load_file

import honeloom
from honeloom.checkpoint.adapter import LoraFile
from honeloom.errors import CheckpointError, ConfigError, IncompatibleModelsError, NotFiniteError, SourceError
from honeloom.stages import aggregate as stage

SHARES = (0.5, 0.3, 0.2)
WEIGHTS_TEXT = "50,30,20"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_model):
    """Scales 2, 1 and rsLoRA's, ranks 4, 2 and 3 with a pattern; the third knows fewer modules."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(tiny_model, root / "a", 1),
        make_adapter(tiny_model, root / "b", 2, r=2, lora_alpha=2),
        make_adapter(
            tiny_model, root / "c", 3, r=3, use_rslora=True, target_modules=["q_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 5}, alpha_pattern={"layers.1.self_attn.q_proj": 3},
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def equals(tmp_path_factory, tiny_model):
    """Two adapters of one rank."""
    root = tmp_path_factory.mktemp("equals")
    return [make_adapter(tiny_model, root / name, seed) for seed, name in enumerate("ab")]


def digest(folder):
    return hashlib.sha256((folder / WEIGHTS).read_bytes() + (folder / CONFIG).read_bytes()).hexdigest()


@pytest.mark.parametrize(("method", "options"), [("flora", {}), ("svd", {"rank": 64}), ("svd", {"energy": 1.0})])
def test_the_loaded_adapter_is_the_sum(adapters, tiny_model, tmp_path, method, options):
    report = honeloom.aggregate(adapters, weights=WEIGHTS_TEXT, method=method, output_dir=tmp_path / "out", **options)
    expected = summed_logits(tiny_model, adapters, SHARES)
    torch.testing.assert_close(logits_of(tiny_model, tmp_path / "out"), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(open_base(tiny_model)), atol=1e-2)
    assert report.status == "ok" and report.artefact.kind == "adapter"
    assert report.details["relative_error"] <= 1e-6
    assert report.metric("relative_error").value == report.details["relative_error"]
    assert report.details["ranks_in"] == [4, 2, 5]
    with LoraFile(tmp_path / "out") as written:
        assert {f.scale for f in written.factors.values()} == {1.0}
        assert report.details["rank_out"] == max(
            written.weights.info(f.a_name).shape[0] for f in written.factors.values()
        )
    merged = PeftModel.from_pretrained(open_base(tiny_model), tmp_path / "out").merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_the_details_tell_ranks_bytes_and_modules(adapters, tmp_path):
    report = honeloom.aggregate(adapters, weights=[50, 30, 20], method="flora", output_dir=tmp_path / "out")
    details = report.details
    assert details["rank_out"] == 11  # 4 + 2 + 5 in one module
    modules = {m["module"]: m for m in details["modules"]}
    assert modules["model.layers.0.self_attn.q_proj"]["ranks"] == [4, 2, 3]
    assert modules["model.layers.1.mlp.down_proj"] | {"relative_error": 0} == {
        "module": "model.layers.1.mlp.down_proj", "ranks": [4, 2, 0], "rank": 6, "relative_error": 0,
    }  # fmt: skip
    sizes = [sum(t.nbytes for t in load_file(a / WEIGHTS).values()) for a in [*adapters, tmp_path / "out"]]
    assert details["bytes_up"] == sum(sizes[:3]) and details["bytes_down"] == 3 * sizes[3]
    assert [c["bytes_up"] for c in details["clients"]] == sizes[:3]
    assert [c["weight"] for c in details["clients"]] == pytest.approx(SHARES)
    assert details["vllm_max_lora_rank"] == 16
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert settings["r"] == settings["lora_alpha"] == 11 and not settings["use_rslora"]
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    assert settings["target_modules"] == sorted(modules)


def test_peft_concatenates_to_the_same_update(adapters, tiny_model, tmp_path):
    """`add_weighted_adapter(combination_type="cat")` is an independent implementation of stacking."""
    plain = adapters[:2]
    honeloom.aggregate(plain, weights=[3, 1], method="flora", output_dir=tmp_path / "out")
    model = PeftModel.from_pretrained(open_base(tiny_model), plain[0], adapter_name="one")
    model.load_adapter(plain[1], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.75, 0.25], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits_of(tiny_model, tmp_path / "out"), logits(model.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["fedit", "fedex", "zero_pad", "flexlora"])
def test_other_rules_on_equal_ranks(equals, tiny_model, tmp_path, method):
    report = honeloom.aggregate(equals, method=method, output_dir=tmp_path / "out")
    gap = float((logits_of(tiny_model, tmp_path / "out") - summed_logits(tiny_model, equals, (0.5, 0.5))).abs().max())
    assert (gap <= 1e-5) == (method == "fedex")
    assert (report.details["relative_error"] <= 1e-6) == (method == "fedex")
    assert report.details["rank_out"] == {"fedex": 12}.get(method, 4)
    assert all(c.passed for c in report.verification)


@pytest.mark.parametrize(("method", "factor"), [("ffa", "A"), ("rolora", "A"), ("rolora", "B")])
def test_rules_with_a_shared_factor(equals, tiny_model, tmp_path, method, factor):
    with pytest.raises(IncompatibleModelsError, match=rf"module 'model.layers.0.*: {method} needs one"):
        honeloom.aggregate(equals, method=method, output_dir=tmp_path / "out")
    copy = tmp_path / "copy"
    shutil.copytree(equals[1], copy)
    shared = {n: t for n, t in load_file(equals[0] / WEIGHTS).items() if f"lora_{factor}" in n}
    edit_weights(copy, lambda ts: ts.update(shared))
    report = honeloom.aggregate([equals[0], copy], method=method, output_dir=tmp_path / "out")
    assert report.details["relative_error"] <= 1e-6 and report.details["rank_out"] == 4
    expected = summed_logits(tiny_model, [equals[0], copy], (0.5, 0.5))
    torch.testing.assert_close(logits_of(tiny_model, tmp_path / "out"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_into_the_base(equals, tiny_model, tmp_path, method, dtype):
    report = honeloom.aggregate(
        equals, weights=[3, 1], method=method, into_base=tiny_model, dtype=dtype, output_dir=tmp_path / "out"
    )
    got, expected = load_file(tmp_path / "out" / "model.safetensors"), summed_weights(tiny_model, equals, (0.75, 0.25))
    rounding = {"auto": 2**-24, "bf16": 2**-8}[dtype]
    for name, tensor in got.items():
        gap = (tensor.double() - expected[name]).abs()
        assert bool((gap <= rounding * expected[name].abs() * 1.01 + 1e-12).all()), name
    assert report.artefact.kind == "model"
    assert [c.passed for c in report.verification] == [True] * 5
    assert not (tmp_path / "out" / CONFIG).exists() and (tmp_path / "out" / "tokenizer.json").exists()
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")]
    assert logits(open_base(tmp_path / "out")).isfinite().all()


def test_truncated_into_the_base(adapters, tiny_model, tmp_path):
    report = honeloom.aggregate(adapters, rank=3, into_base=tiny_model, output_dir=tmp_path / "out")
    assert report.details["rank_out"] == 3 and 0.01 < report.details["relative_error"] < 1
    assert len(report.verification) == 4


def test_the_order_of_the_clients_changes_no_byte(adapters, tmp_path):
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    for method in ("flora", "svd", "zero_pad"):
        found = set()
        for i, order in enumerate(orders):
            out = tmp_path / f"{method}{i}"
            report = honeloom.aggregate(
                [adapters[k] for k in order], weights=[SHARES[k] for k in order], method=method, output_dir=out
            )
            assert report.details["ranks_in"] == [(4, 2, 5)[k] for k in order]
            found.add(digest(out))
        assert len(found) == 1, method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_adapters_and_narrow_output(tiny_model, tmp_path, dtype):
    given = [make_adapter(tiny_model, tmp_path / n, s, dtype) for s, n in enumerate("ab")]
    report = honeloom.aggregate(given, method="flora", output_dir=tmp_path / "wide")
    assert report.details["relative_error"] <= 1e-6
    assert {t.dtype for t in load_file(tmp_path / "wide" / WEIGHTS).values()} == {torch.float32}
    narrow = honeloom.aggregate(given, method="svd", dtype="bf16", output_dir=tmp_path / "narrow")
    assert {t.dtype for t in load_file(tmp_path / "narrow" / WEIGHTS).values()} == {torch.bfloat16}
    assert narrow.verification[1].limit == 2e-2


def test_values_beyond_the_output_type(equals, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(equals[0], copy)
    edit_weights(copy, lambda ts: ts.update({n: t * 1e6 for n, t in ts.items()}))
    with pytest.raises(NotFiniteError, match=r"beyond the range of torch.float16; choose dtype"):
        honeloom.aggregate([copy], method="flora", dtype="fp16", output_dir=tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_inputs_name_file_and_tensor(equals, tmp_path, value):
    copy = tmp_path / "copy"
    shutil.copytree(equals[1], copy)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    edit_weights(copy, lambda ts: ts[name].view(-1).__setitem__(7, value))
    for method in ("flora", "svd"):
        with pytest.raises(
            NotFiniteError, match=r"copy/adapter_model.safetensors: tensor '.*layers.1.*lora_A.*element 7"
        ):
            honeloom.aggregate([equals[0], copy], method=method, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "factors have biases"),
        ({"target_parameters": ["x"]}, "not modules"),
        ({"trainable_token_indices": [1]}, "token embeddings"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"lora_alpha": "big"}, "must be a number"),
    ],
)
def test_adapters_that_do_not_add_up_are_refused(equals, tmp_path, changes, reason):
    copy = tmp_path / "copy"
    shutil.copytree(equals[1], copy)
    edit_json(copy / CONFIG, **changes)
    with pytest.raises(CheckpointError, match=rf"copy.*{reason}"):
        honeloom.aggregate([equals[0], copy], output_dir=tmp_path / "out")


def test_weights_that_are_stored_transposed(tmp_path):
    """The factors add up all the same; into a base they would have to be turned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)).save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = [
            make_adapter(base, tmp_path / n, s, target_modules=["c_attn", "c_proj"], r=r, fan_in_fan_out=True)
            for s, (n, r) in enumerate((("a", 4), ("b", 2)))
        ]
        honeloom.aggregate(given, method="flora", output_dir=tmp_path / "out")
        expected = summed_logits(base, given, (0.5, 0.5))
        torch.testing.assert_close(logits_of(base, tmp_path / "out"), expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"fan_in_fan_out is set, and its weights are stored transposed"):
        honeloom.aggregate(given, into_base=base, output_dir=tmp_path / "merged")


def test_embeddings(tiny_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = [
            make_adapter(tiny_model, tmp_path / n, s, target_modules=["embed_tokens", "v_proj"])
            for s, n in enumerate("ab")
        ]
        honeloom.aggregate(given, method="svd", rank=8, output_dir=tmp_path / "out")
        expected = summed_logits(tiny_model, given, (0.5, 0.5))
        torch.testing.assert_close(logits_of(tiny_model, tmp_path / "out"), expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="is an embedding"):
        honeloom.aggregate(given, into_base=tiny_model, output_dir=tmp_path / "merged")


def test_saved_modules_are_averaged(tiny_model, tmp_path):
    given = [make_adapter(tiny_model, tmp_path / n, s, modules_to_save=["lm_head"]) for s, n in enumerate("ab")]
    name = "base_model.model.lm_head.weight"
    for adapter, factor in zip(given, (1.5, 0.5), strict=True):
        edit_weights(adapter, lambda ts, factor=factor: ts[name].mul_(factor))
    honeloom.aggregate(given, weights=[3, 1], method="flora", output_dir=tmp_path / "out")
    expected = summed_logits(tiny_model, given, (0.75, 0.25))
    torch.testing.assert_close(logits_of(tiny_model, tmp_path / "out"), expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="replaces whole modules"):
        honeloom.aggregate(given, into_base=tiny_model, output_dir=tmp_path / "merged")
    edit_weights(given[1], lambda ts: ts.pop(name))
    with pytest.raises(CheckpointError, match=r"has no tensor 'base_model.model.lm_head.weight'"):
        honeloom.aggregate(given, output_dir=tmp_path / "again")


def test_different_settings_and_sizes_are_refused(equals, other_model, tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(equals[1], copy)
    edit_json(copy / CONFIG, bias="all")
    with pytest.raises(IncompatibleModelsError, match=r"bias is 'none' and 'all'|bias is 'all' and 'none'"):
        honeloom.aggregate([equals[0], copy], output_dir=tmp_path / "out")
    edit_json(copy / CONFIG, bias="none", base_model_name_or_path=str(other_model))
    with pytest.raises(IncompatibleModelsError) as caught:
        honeloom.aggregate([equals[0], copy], output_dir=tmp_path / "out")
    assert str(tiny_model) in str(caught.value) and str(other_model) in str(caught.value)
    same = tmp_path / "same"
    shutil.copytree(tiny_model, same)
    edit_json(copy / CONFIG, base_model_name_or_path=str(same))
    assert honeloom.aggregate([equals[0], copy], output_dir=tmp_path / "by-content").status == "ok"
    edit_json(copy / CONFIG, base_model_name_or_path=None)
    report = honeloom.aggregate([equals[0], copy], output_dir=tmp_path / "unnamed")
    assert any("only sizes were compared" in w for w in report.warnings)
    edit_weights(copy, lambda ts: ts.update({n: t[:, :16] for n, t in ts.items() if "lora_A" in n}))
    with pytest.raises(IncompatibleModelsError, match="tuned on different models"):
        honeloom.aggregate([equals[0], copy], output_dir=tmp_path / "out")


def test_the_base_need_not_be_here(equals, tiny_model, tmp_path):
    for i, adapter in enumerate(equals):
        shutil.copytree(adapter, tmp_path / str(i))
        edit_json(tmp_path / str(i) / CONFIG, base_model_name_or_path="nobody/has-this-model")
    report = honeloom.aggregate([tmp_path / "0", tmp_path / "1"], method="flora", output_dir=tmp_path / "out")
    assert report.details["base_model"] == "nobody/has-this-model"
    merged = honeloom.aggregate(
        [tmp_path / "0", tmp_path / "1"], method="flora", into_base=tiny_model, output_dir=tmp_path / "merged"
    )
    assert any("not known to be the same model" in w for w in merged.warnings)


def test_what_is_no_base(equals, other_model, tmp_path):
    with pytest.raises(ConfigError, match="is an adapter"):
        honeloom.aggregate(equals, into_base=equals[0], output_dir=tmp_path / "out")
    quantised = tmp_path / "quantised"
    shutil.copytree(other_model, quantised)
    edit_json(quantised / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CheckpointError, match="quantised"):
        honeloom.aggregate(equals, into_base=quantised, output_dir=tmp_path / "out")
    with pytest.raises(SourceError, match=r"no adapter_config\.json, so it is no adapter"):
        honeloom.aggregate([equals[0], other_model], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_that_vllm_does_not_take(equals, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "VLLM_RANKS", (1, 4))
    report = honeloom.aggregate(equals, method="flora", output_dir=tmp_path / "out")
    assert report.details["vllm_max_lora_rank"] is None
    assert any("rank 8 is beyond 4, the largest max_lora_rank of vLLM" in w for w in report.warnings)


def test_a_result_is_an_input(adapters, tiny_model, tmp_path):
    """Aggregates of aggregates: weighted means of weighted means."""
    honeloom.aggregate(adapters[:2], weights=[50, 30], method="flora", output_dir=tmp_path / "first")
    honeloom.aggregate(
        [tmp_path / "first", adapters[2]], weights=[80, 20], method="flora", output_dir=tmp_path / "both"
    )
    expected = summed_logits(tiny_model, adapters, SHARES)
    torch.testing.assert_close(logits_of(tiny_model, tmp_path / "both"), expected, rtol=0, atol=1e-5)
    with LoraFile(tmp_path / "both") as written:
        assert all(torch.isfinite(written.weights.read(n)).all() for n in written.weights.names())
    assert merged_weights(tiny_model, tmp_path / "both").keys() == summed_weights(tiny_model, [], []).keys()


def test_a_recipe_tunes_aggregates_and_measures(tmp_path):
    """The base is made by the run itself, so that nothing lies at the path that the adapters name until the end."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """version: 1
vars: {rows: lab:dev}
stages:
  base: {merge: {models: [lab:base, lab:base]}}
  north: {tune: {model: $base, rows: $rows, limit: 12, max_steps: 1, method: {type: lora, rank: 4}}}
  south: {tune: {model: $base, rows: $rows, limit: 12, max_steps: 1, seed: 5, method: {type: lora, rank: 2}}}
  global: {aggregate: {adapters: [$north, $south], weights: [2, 1], method: flora}}
  score: {evaluate: {model: $global, rows: $rows, limit: 12}}
"""
    )
    report = honeloom.run(recipe, output_dir=tmp_path / "out")
    assert report.status == "ok"
    out = tmp_path / "out" / "stages" / "4-global"
    assert json.loads((out / "report.json").read_bytes())["details"]["rank_out"] == 6
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    found = honeloom.evaluate(moved / "stages" / "4-global", rows="lab:dev", limit=12)
    assert found.metric("loss").value == pytest.approx(report.metric("score/loss").value)
    assert found.details["overlap"]["rows"] > 0  # through the adapters, to the rows they were tuned on
    (plan,) = [p for p in honeloom.plan("run", recipe=recipe, output_dir=moved) if p.stage == "global"]
    assert plan.inputs["adapters.0"].endswith("2-north")
