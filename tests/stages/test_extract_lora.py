"""`extract-lora` on tiny models: PEFT is the oracle for what is loaded, the exact decomposition for what is left."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import honeloom
from honeloom.checkpoint.adapter import LoraFile
from honeloom.cli.main import main
from honeloom.errors import ConfigError, IncompatibleModelsError, NotFiniteError, VerificationError
from honeloom.stages import extract_checks
from honeloom.stages import extract_lora as stage
from honeloom.stages.inputs import resolve_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(3, 43).view(2, 20)


def write_weights(source, folder, change):
    """A copy of a model folder whose tensors a function has changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_linear(name):
    return ".layers." in name and name.endswith("_proj.weight")


def disturb(names, std=0.02, seed=0):
    """Add noise to the tensors that a predicate names."""

    def change(tensors):
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(tensors):
            if names(name):
                noise = torch.randn(tensors[name].shape, generator=generator) * std
                tensors[name] = (tensors[name].float() + noise).to(tensors[name].dtype)

    return change


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model):
    """A model that differs from the tiny one in its linear layers alone."""
    return write_weights(tiny_model, tmp_path_factory.mktemp("tuned") / "model", disturb(is_linear))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    """A PEFT adapter of rank 3 and scale 2 of two kinds of modules."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter") / "a"
    settings = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(open_model(tiny_model), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**document, "base_model_name_or_path": str(tiny_model)}))
    return folder


def open_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def logits_of(base, adapter):
    return logits(PeftModel.from_pretrained(open_model(base), adapter).eval())


def delta_of(model, base):
    """Tensor -> difference in float64, of all tensors."""
    one, two = (load_file(folder / "model.safetensors") for folder in (model, base))
    return {name: one[name].double() - two[name].double() for name in one}


def products(folder):
    """Module -> scale B A, by the loader's rules."""
    with LoraFile(folder) as file:
        return {
            name: f.scale * file.weights.read(f.b_name, torch.float64) @ file.weights.read(f.a_name, torch.float64)
            for name, f in file.factors.items()
        }


def test_at_full_rank_base_and_adapter_are_the_model(tuned, tiny_model, tmp_path):
    """Golden: full rank reproduces the difference, and PEFT the model."""
    report = honeloom.extract_lora(tuned, tiny_model, tmp_path / "out", rank=64)
    delta = delta_of(tuned, tiny_model)
    found = products(tmp_path / "out")
    assert {f"{m}.weight" for m in found} == {n for n in delta if is_linear(n)}
    for module, product in found.items():
        gap = torch.linalg.matrix_norm(product - delta[f"{module}.weight"])
        assert gap <= 1e-5 * torch.linalg.matrix_norm(delta[f"{module}.weight"])
    torch.testing.assert_close(logits_of(tiny_model, tmp_path / "out"), logits(open_model(tuned)), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(open_model(tuned)), logits(open_model(tiny_model)), atol=1e-2)
    details = report.details
    assert details["relative_error"] <= 1e-5 and details["total_relative_error"] <= 1e-5
    assert (details["rank"], details["outside_share"], details["unchanged_modules"]) == (32, 0.0, 0)
    assert report.metric("logits_gap").value <= 1e-5
    assert report.artefact.kind == "adapter" and [c.passed for c in report.verification] == [True] * 3
    assert report.warnings == ()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_error_is_that_of_the_best_factors(tuned, tiny_model, tmp_path, rank):
    """Golden: rank-r error squared is the sum of the squared singular values beyond r, in every module and together."""
    report = honeloom.extract_lora(tuned, tiny_model, tmp_path / "out", rank=rank)
    delta = {n.removesuffix(".weight"): d for n, d in delta_of(tuned, tiny_model).items() if is_linear(n)}
    left = total = 0.0
    for entry in report.details["modules"]:
        squares = torch.linalg.svdvals(delta[entry["module"]]).square()
        best = float(squares[rank:].sum() / squares.sum()) ** 0.5
        assert best * (1 - 1e-6) <= entry["relative_error"] <= 1.02 * best
        left, total = left + float(squares[rank:].sum()), total + float(squares.sum())
        assert entry["norm"] == pytest.approx(float(squares.sum()) ** 0.5)
        assert entry["rank"] == rank
    assert report.details["relative_error"] == pytest.approx((left / total) ** 0.5, rel=1e-2)
    assert report.metric("relative_error").value == report.details["relative_error"]
    assert any(f"keep {1 - report.details['relative_error'] ** 2:.0%} of" in w for w in report.warnings) == (
        report.details["relative_error"] > 0.5
    )


def test_an_energy_gives_every_module_its_rank(tiny_model, tmp_path):
    def change(tensors):
        disturb(is_linear, 1e-3)(tensors)
        tensors["model.layers.0.self_attn.q_proj.weight"][3] += 1.0  # one row: rank one holds nearly all

    model = write_weights(tiny_model, tmp_path / "model", change)
    report = honeloom.extract_lora(model, tiny_model, tmp_path / "out", energy=0.9)
    ranks = {m["module"]: m["rank"] for m in report.details["modules"]}
    assert ranks.pop("model.layers.0.self_attn.q_proj") == 1 and min(ranks.values()) > 8
    delta = delta_of(model, tiny_model)
    for entry in report.details["modules"]:
        held = torch.linalg.svdvals(delta[f"{entry['module']}.weight"]).square().cumsum(0)
        wanted = int((held < 0.9 * held[-1]).sum()) + 1
        assert wanted <= entry["rank"] <= wanted + 1
        assert entry["relative_error"] <= 0.1**0.5
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert settings["rank_pattern"]["^model.layers.0.self_attn.q_proj"] == 1
    merged = PeftModel.from_pretrained(open_model(tiny_model), tmp_path / "out").merge_and_unload().state_dict()
    base = load_file(tiny_model / "model.safetensors")
    for module, product in products(tmp_path / "out").items():
        name = f"{module}.weight"
        torch.testing.assert_close(merged[name].double(), base[name].double() + product, rtol=0, atol=1e-6)
    capped = honeloom.extract_lora(model, tiny_model, tmp_path / "capped", energy=0.9, rank=3)
    assert sorted({m["rank"] for m in capped.details["modules"]}) == [1, 3]


def test_a_merged_adapter_is_found_again(adapter, tiny_model, tmp_path):
    """Its rank is enough, and other modules stay out; the folder of the adapter stands for the merged model too."""
    merged = PeftModel.from_pretrained(open_model(tiny_model), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    wanted = products(adapter)
    for name, model in (("of-merged", tmp_path / "merged"), ("of-adapter", adapter)):
        report = honeloom.extract_lora(model, tiny_model, tmp_path / name, rank=3)
        found = products(tmp_path / name)
        assert found.keys() == wanted.keys()
        for module, product in found.items():
            torch.testing.assert_close(product, wanted[module], rtol=0, atol=1e-5)
        assert report.details["unchanged_modules"] == 10
        assert report.details["relative_error"] <= 1e-5 and report.metric("logits_gap").value <= 1e-4


def test_what_lies_outside_is_measured(tiny_model, tmp_path):
    """Squares by hand: 48 ones to one norm, 12 ones to embeddings; the linear difference is 140 in one weight."""

    def change(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] += 140**0.5
        tensors["model.layers.0.input_layernorm.weight"] += 1.0  # 32 elements
        tensors["model.norm.weight"][:16] += 1.0
        tensors["model.embed_tokens.weight"][2, :12] += 1.0

    model = write_weights(tiny_model, tmp_path / "model", change)
    report = honeloom.extract_lora(model, tiny_model, tmp_path / "out", rank=1)
    details = report.details
    assert details["outside_share"] == pytest.approx(60 / 200, rel=1e-5)
    assert details["outside"] == pytest.approx(
        {"embeddings": 12 / 200, "head": 0, "norms": 48 / 200, "biases": 0, "other weights": 0}, rel=1e-5
    )
    assert details["relative_error"] <= 1e-6
    assert details["total_relative_error"] == pytest.approx((60 / 200) ** 0.5, rel=1e-5)
    assert [m["module"] for m in details["modules"]] == ["model.layers.1.self_attn.v_proj"]
    assert any("30% of the squared difference lies outside of the adapter (embeddings 6%, norms 24%)" in w
               for w in report.warnings)  # fmt: skip


def test_targets(tuned, tiny_model, tmp_path):
    report = honeloom.extract_lora(tuned, tiny_model, tmp_path / "out", targets=r".*\.(q_proj|v_proj)", rank=32)
    assert {m["module"].rpartition(".")[2] for m in report.details["modules"]} == {"q_proj", "v_proj"}
    assert report.details["outside"]["other weights"] == report.details["outside_share"] > 0.3
    with pytest.raises(ConfigError, match=r"matches no linear layer of .*14: model.layers.0.*all-linear"):
        honeloom.extract_lora(tuned, tiny_model, tmp_path / "none", targets="q_proj")  # the whole path must match
    with pytest.raises(ConfigError, match=r"targets: no regular expression"):
        honeloom.extract_lora(tuned, tiny_model, tmp_path / "none", targets="(")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_and_narrow_factors(tiny_model, tmp_path, dtype):
    def narrow(tensors):
        tensors.update({n: t.to(dtype) for n, t in tensors.items()})

    base = write_weights(tiny_model, tmp_path / "base", narrow)
    model = write_weights(base, tmp_path / "model", disturb(is_linear))
    report = honeloom.extract_lora(model, base, tmp_path / "wide", rank=64)
    assert report.details["relative_error"] <= 1e-6
    assert {t.dtype for t in load_file(tmp_path / "wide" / WEIGHTS).values()} == {torch.float32}
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    rounded = honeloom.extract_lora(model, base, tmp_path / "narrow", rank=64, dtype=name)
    assert {t.dtype for t in load_file(tmp_path / "narrow" / WEIGHTS).values()} == {dtype}
    assert 1e-5 < rounded.details["relative_error"] < 2e-2  # what is stated is of the factors as they are written


def test_the_same_bytes_whatever_the_threads_and_pieces(tuned, tiny_model, tmp_path, monkeypatch):
    from honeloom.stages import extract_models

    honeloom.extract_lora(tuned, tiny_model, tmp_path / "one", rank=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(extract_models, "CHUNK", 37)
        honeloom.extract_lora(tuned, tiny_model, tmp_path / "two", rank=4)
    finally:
        torch.set_num_threads(before)
    other = honeloom.extract_lora(tuned, tiny_model, tmp_path / "other", rank=4, seed=1)
    one, two, three = ((tmp_path / n / WEIGHTS).read_bytes() for n in ("one", "two", "other"))
    assert one == two != three
    assert other.details["relative_error"] == pytest.approx(
        json.loads((tmp_path / "one" / "report.json").read_text())["details"]["relative_error"], rel=1e-2
    )


def test_one_model_twice(tuned, tiny_model, tmp_path):
    with pytest.raises(IncompatibleModelsError, match="are the same model"):
        honeloom.extract_lora(tiny_model, tiny_model, tmp_path / "out")
    copy = write_weights(tiny_model, tmp_path / "copy", lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(IncompatibleModelsError, match="hold equal weights in all 14 modules"):
        honeloom.extract_lora(copy, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_models_that_have_no_difference(tuned, tiny_model, tmp_path):
    def more_tokens(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:2]])

    rows = load_file(tiny_model / "model.safetensors")["lm_head.weight"].shape[0]
    wide = write_weights(tuned, tmp_path / "wide", more_tokens)
    change_config(wide, vocab_size=rows + 2)
    with pytest.raises(IncompatibleModelsError, match=rf"\({rows + 2}, 32\) .* \({rows}, 32\) .*vocabularies differ"):
        honeloom.extract_lora(wide, tiny_model, tmp_path / "out")
    short = write_weights(
        tuned, tmp_path / "short", lambda ts: ts.update({n: t[:40] for n, t in ts.items() if "gate_proj" in n})
    )
    with pytest.raises(IncompatibleModelsError, match=r"gate_proj.* is \(40, 32\) .*\(48, 32\).*different sizes"):
        honeloom.extract_lora(short, tiny_model, tmp_path / "out")
    less = write_weights(tuned, tmp_path / "less", lambda ts: ts.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(IncompatibleModelsError, match=r"has the tensor 'model.layers.1.mlp.up_proj.weight' and .*less"):
        honeloom.extract_lora(less, tiny_model, tmp_path / "out")
    other = write_weights(tuned, tmp_path / "kind", lambda ts: None)
    change_config(other, model_type="mistral", architectures=["MistralForCausalLM"])
    with pytest.raises(IncompatibleModelsError, match=r"is a mistral model and .* a llama"):
        honeloom.extract_lora(other, tiny_model, tmp_path / "out")
    broken = write_weights(
        tuned, tmp_path / "broken", lambda ts: ts["model.layers.0.self_attn.q_proj.weight"][1, 2].fill_(float("nan"))
    )
    with pytest.raises(NotFiniteError, match=r"broken.*q_proj.*element 34"):
        honeloom.extract_lora(broken, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_config_is_told(tuned, tiny_model, tmp_path):
    copy = write_weights(tuned, tmp_path / "copy", lambda ts: None)
    change_config(copy, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}, max_position_embeddings=256)
    report = honeloom.extract_lora(copy, tiny_model, tmp_path / "out", rank=64)
    assert any("config.json differs in rope_parameters:" in w for w in report.warnings)
    assert report.metric("logits_gap").value > 1e-4


def test_tied_and_untied(tiny_model, tmp_path):
    """A head of its own is a difference from the embeddings that stand for it in the base."""

    def tie(tensors):
        del tensors["lm_head.weight"]

    def untie(tensors):
        disturb(is_linear)(tensors)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.5

    base = write_weights(tiny_model, tmp_path / "base", tie)
    change_config(base, tie_word_embeddings=True)
    model = write_weights(tiny_model, tmp_path / "model", untie)
    report = honeloom.extract_lora(model, base, tmp_path / "out", rank=64)
    rows = load_file(tiny_model / "model.safetensors")["lm_head.weight"].shape[0]
    linear = sum(float(d.square().sum()) for n, d in delta_of(model, tiny_model).items() if is_linear(n))
    head = 0.25 * 32 * rows
    assert report.details["outside"]["head"] == pytest.approx(head / (head + linear), rel=1e-5)
    assert report.details["outside"]["embeddings"] == 0
    same = write_weights(base, tmp_path / "same", disturb(is_linear))
    assert honeloom.extract_lora(same, base, tmp_path / "tied", rank=64).metric("logits_gap").value <= 1e-5


def test_the_base_may_be_an_adapter(tuned, adapter, tiny_model, tmp_path):
    """The difference is from what it makes of its base; no loader stacks the two, so nothing is loaded."""
    report = honeloom.extract_lora(tuned, adapter, tmp_path / "out", rank=64)
    first, found = products(adapter), products(tmp_path / "out")
    delta = delta_of(tuned, tiny_model)
    for module, product in found.items():
        torch.testing.assert_close(product, delta[f"{module}.weight"] - first.get(module, 0), rtol=0, atol=1e-6)
    assert any("merge the two first" in w for w in report.warnings)
    assert any("was not loaded: its base is an adapter itself" in w for w in report.warnings)
    assert len(report.verification) == 2 and [m.name for m in report.metrics] == ["relative_error"]


def test_weights_that_are_stored_transposed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)).save_pretrained(base)
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    model = write_weights(base, tmp_path / "model", disturb(lambda n: n.endswith(linear)))
    report = honeloom.extract_lora(model, base, tmp_path / "out", rank=64)
    assert len(report.details["modules"]) == 8 and report.details["relative_error"] <= 1e-5
    assert report.metric("logits_gap").value <= 1e-5 and report.details["outside_share"] == 0
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["fan_in_fan_out"] is True


def test_experts_and_routers_are_no_linear_layers(tmp_path):
    """transformers holds experts as one tensor per layer, which LoRA cannot target: they are counted as outside."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "mixtral"
    MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, num_local_experts=2, max_position_embeddings=64,
        )
    ).save_pretrained(base)  # fmt: skip
    model = write_weights(base, tmp_path / "model", disturb(lambda n: "layers.0" in n and "norm" not in n))
    report = honeloom.extract_lora(model, base, tmp_path / "out", rank=64)
    assert {m["module"].split(".")[3] for m in report.details["modules"]} == {"self_attn"}
    delta = delta_of(model, base)
    total = sum(float(d.square().sum()) for d in delta.values())
    others = sum(float(d.square().sum()) for n, d in delta.items() if "self_attn" not in n)
    assert report.details["outside"]["other weights"] == pytest.approx(others / total, rel=1e-6)


def test_a_wrong_adapter_is_not_published(tuned, tiny_model, tmp_path, monkeypatch):
    right = stage.write_adapter

    def wrong(folder, config, streams):
        size = right(folder, config, streams)
        tensors = load_file(folder / WEIGHTS)
        save_file({n: t * 1.001 for n, t in tensors.items()}, folder / WEIGHTS)
        return size

    monkeypatch.setattr(stage, "write_adapter", wrong)
    with pytest.raises(VerificationError, match="as far from the model as stated"):
        honeloom.extract_lora(tuned, tiny_model, tmp_path / "out", rank=8)
    monkeypatch.setattr(
        stage, "write_adapter", lambda folder, config, streams: right(folder, {**config, "lora_alpha": 4}, streams)
    )
    with pytest.raises(VerificationError, match="scale in the loader would not be 1"):
        honeloom.extract_lora(tuned, tiny_model, tmp_path / "out", rank=8)
    assert not (tmp_path / "out").exists()


def test_without_peft_nothing_is_loaded(tuned, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(extract_checks, "installed_version", lambda name: None)
    report = honeloom.extract_lora(tuned, tiny_model, tmp_path / "out")
    assert any("peft is not installed (pip install 'honeloom[tune]')" in w for w in report.warnings)
    assert len(report.verification) == 2


def test_the_folder_is_an_adapter_of_the_base(tuned, tiny_model, tmp_path):
    report = honeloom.extract_lora(tuned, tiny_model, tmp_path / "out")
    found = resolve_model(str(tmp_path / "out"))
    assert found.base == tiny_model and found.fingerprint == report.artefact.sha256
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tuned / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "out").rglob(".*"))
    assert honeloom.verify(tmp_path / "out").status == "ok"
    assert honeloom.load_model(tmp_path / "out").active_adapters == ["default"]
    again = honeloom.extract_lora(tuned, tiny_model, tmp_path / "out", resume=True)
    assert again.reused and again.details["rank"] == 16


def test_the_command(tuned, tiny_model, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    code, out, _ = run("extract-lora", tuned, tiny_model, tmp_path / "out", "--rank", "4", "--json")
    document = json.loads(out)
    assert (code, document["verb"], document["details"]["rank"]) == (0, "extract-lora", 4)
    code, out, _ = run("extract-lora", tuned, tiny_model, "--output-dir", tmp_path / "two", "--energy", "0.5")
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "two")
    code, out, _ = run("extract-lora", tuned, tiny_model, tmp_path / "three", "--dry-run")
    assert code == 0 and not (tmp_path / "three").exists()
    code, _, err = run("extract-lora", tiny_model, tiny_model, tmp_path / "three")
    assert code == 2 and "same model" in err
    code, _, err = run("extract-lora", tuned, tiny_model, tmp_path / "three", "--rank", "0")
    assert code == 2 and "rank" in err


def test_a_recipe_extracts_and_measures(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """version: 1
stages:
  full: {tune: {model: lab:base, rows: lab:dev, limit: 12, max_steps: 2, method: full}}
  small: {extract-lora: {tuned: $full, base: lab:base, rank: 8}}
  score: {evaluate: {model: $small, rows: lab:dev, limit: 12}}
"""
    )
    report = honeloom.run(recipe, output_dir=tmp_path / "out")
    assert report.status == "ok"
    folder = tmp_path / "out" / "stages" / "2-small"
    assert resolve_model(str(folder)).base == resolve_model("lab:base").paths[0]


def test_a_base_of_the_same_run_is_found_beside_the_adapter(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """version: 1
stages:
  start: {tune: {model: lab:base, rows: lab:dev, limit: 12, max_steps: 1, method: full}}
  full: {tune: {model: $start, rows: lab:dev, limit: 12, max_steps: 2, method: full, seed: 1}}
  small: {extract-lora: {tuned: $full, base: $start, rank: 8}}
  score: {evaluate: {model: $small, rows: lab:dev, limit: 12}}
"""
    )
    assert honeloom.run(recipe, output_dir=tmp_path / "out").status == "ok"
    (tmp_path / "out").rename(tmp_path / "moved")
    found = resolve_model(str(tmp_path / "moved" / "stages" / "3-small"))
    assert found.base == (tmp_path / "moved" / "stages" / "1-start").resolve()
