"""The mix stage on tiny models: equal experts are the dense model, folders are standard, refusals say why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mixing_models import IDS, logits, open_model, write_model, write_rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from honeloom.backends.hf.load import Loading, load_model
from honeloom.errors import CheckpointError, ConfigError, IncompatibleModelsError, NotFiniteError, SourceError
from honeloom.mixture import layout

EQUAL = 1e-5


def gap(one, other):
    return float((one - other).abs().max())


def tensors(folder):
    return load_file(folder / "model.safetensors")


def edited(source, folder, change):
    """A copy of a model whose tensors a function has changed."""
    shutil.copytree(source, folder)
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def checks_pass(outcome):
    return [c.claim for c in outcome.checks if not c.passed] == []


@pytest.mark.parametrize(
    ("family", "more", "format_"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"tie_word_embeddings": True, "head_dim": 12}, "mixtral"),
        ("mistral", {"sliding_window": 8}, "mixtral"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
        ("gemma2", {"head_dim": 8}, "honeloom_mixture"),
        ("olmo2", {}, "honeloom_mixture"),
        ("llama", {"attention_bias": True}, "honeloom_mixture"),
    ],
)
def test_equal_experts_are_the_dense_model(tmp_path, mix, family, more, format_):
    model = write_model(tmp_path / "m", 0, family, **more)
    outcome = mix([model] * 3, router="random", seed=5)
    assert outcome.details["format"] == format_
    assert checks_pass(outcome)
    opened = open_model(mix.out) if format_ != "honeloom_mixture" else load_model(mix.out, loading=Loading("cpu"))
    assert gap(logits(opened), logits(open_model(model))) <= EQUAL


@pytest.mark.parametrize("level", ["ffn", "block", "model"])
@pytest.mark.parametrize("dense", [0, 1])
def test_equal_experts_in_our_own_formats(tmp_path, mix, llamas, level, dense):
    outcome = mix([llamas[0]] * 2, router="random", level=level, dense_layers=dense, format="honeloom")
    assert checks_pass(outcome)
    opened = load_model(mix.out, loading=Loading("cpu"))
    assert gap(logits(opened), logits(open_model(llamas[0]))) <= EQUAL


def test_one_expert_is_its_model_with_the_base_around_it(tmp_path, mix, llamas):
    mix([llamas[1]], router="random", base_model=llamas[0])
    wanted = edited(llamas[0], tmp_path / "w", lambda t: t.update({n: v for n, v in tensors(Path(llamas[1])).items()
                                                                   if ".mlp." in n}))  # fmt: skip
    assert gap(logits(open_model(mix.out)), logits(open_model(wanted))) <= EQUAL


def test_a_mixtral_folder_is_the_classic_one(tmp_path, mix, llamas):
    """Names, values and config; transformers writes back what it has read, byte for byte."""
    outcome = mix(llamas, router="random", top_k=2)
    config = json.loads((mix.out / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)
    assert config["sliding_window"] is None
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    found, sources = tensors(mix.out), [tensors(Path(m)) for m in llamas]
    for layer in range(3):
        stem = f"model.layers.{layer}.block_sparse_moe"
        assert found[f"{stem}.gate.weight"].shape == (3, 32)
        for e, source in enumerate(sources):
            for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                dense = source[f"model.layers.{layer}.mlp.{theirs}.weight"]
                assert torch.equal(found[f"{stem}.experts.{e}.{ours}.weight"], dense)
    open_model(mix.out).save_pretrained(tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert {n: (t.dtype, t.shape, t.numpy().tobytes()) for n, t in found.items()} == {
        n: (t.dtype, t.shape, t.numpy().tobytes()) for n, t in again.items()
    }
    total = sum(t.numel() for t in found.values())
    expert = 3 * 3 * 32 * 48
    assert outcome.details["params"] == {"total": total, "active": total - expert}
    assert sorted(p.name for p in mix.out.iterdir()) == [
        "config.json", "generation_config.json", "mix.yaml", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwen_folder_is_written_back_byte_for_byte(tmp_path, mix, family):
    models = [write_model(tmp_path / n, s, family) for s, n in enumerate("ab")]
    outcome = mix(models, router="random", dense_layers=1)
    assert checks_pass(outcome)
    config = AutoConfig.from_pretrained(mix.out)
    assert (config.model_type, config.mlp_only_layers, config.norm_topk_prob) == (f"{family}_moe", [0], True)
    open_model(mix.out).save_pretrained(tmp_path / "again")
    found, again = tensors(mix.out), tensors(tmp_path / "again")
    assert found.keys() == again.keys()
    assert all(torch.equal(found[n], again[n]) for n in found)
    assert torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], tensors(Path(models[0]))["model.layers.0.mlp.up_proj.weight"]
    )


def test_long_rope_survives(tmp_path, mix):
    rope = {
        "rope_type": "llama3", "rope_theta": 20000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = write_model(tmp_path / "m", 0, rope_parameters=rope)
    mix([model] * 2, router="random")
    config = json.loads((mix.out / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_theta"] == 20000.0
    assert AutoConfig.from_pretrained(mix.out).rope_parameters == rope
    assert gap(logits(open_model(mix.out)), logits(open_model(model))) <= EQUAL


def test_a_swap_of_gate_and_up_is_detected(mix, llamas, monkeypatch):
    monkeypatch.setattr(layout, "_LAST", {"gate_proj": "w3", "up_proj": "w1", "down_proj": "w2"})
    outcome = mix(llamas[:2], router="random")
    failed = [c for c in outcome.checks if not c.passed]
    assert len(failed) == 1
    assert failed[0].claim.startswith("gates held to one expert")
    assert failed[0].value > 0.01


def test_experts_in_the_wrong_order_are_detected(mix, llamas, monkeypatch):
    monkeypatch.setattr(layout, "_all", lambda trunk: range(trunk.experts)[::-1])
    first = layout.mixtral
    monkeypatch.setattr(
        "honeloom.stages.mix_write.mixtral",
        lambda *a: [
            layout.Entry(**{f: getattr(e, f) for f in ("shape", "origin", "tensor", "scale", "expert")},
                         name=e.name.replace("experts.0.", "experts.x.").replace("experts.1.", "experts.0.")
                         .replace("experts.x.", "experts.1."))
            for e in first(*a)
        ],
    )  # fmt: skip
    assert not checks_pass(mix(llamas[:2], router="random"))


def test_dense_layers_of_a_mixtral_are_equal_experts(mix, llamas):
    outcome = mix(llamas[1:], base_model=llamas[0], router="random", dense_layers=2)
    assert checks_pass(outcome)
    assert any("the first 2 hold 2 equal experts each" in line for line in mix.said)
    found, base = tensors(mix.out), tensors(Path(llamas[0]))
    for e in range(2):
        w1 = found[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"]
        assert torch.equal(w1, base["model.layers.1.mlp.gate_proj.weight"])


def test_all_layers_dense_is_refused(mix, llamas):
    with pytest.raises(ConfigError, match="the base has 3 layers, so none would be routed"):
        mix(llamas, router="random", dense_layers=3)


@pytest.mark.parametrize(("family", "format_"), [("llama", "auto"), ("qwen2", "auto"), ("llama", "honeloom")])
def test_a_shared_expert_counts_whole(tmp_path, mix, family, format_):
    """Experts of zeros: what is left is the shared expert, whatever the gate says."""
    models = [write_model(tmp_path / n, s, family) for s, n in enumerate("ab")]
    zero = edited(models[0], tmp_path / "zero", lambda t: [t[n].zero_() for n in t if "down_proj" in n])
    outcome = mix([zero, zero], base_model=models[0], shared_expert=models[1], router="random", format=format_)
    assert outcome.details["format"] == ("qwen2_moe" if format_ == "auto" else "honeloom_mixture")
    assert checks_pass(outcome)
    wanted = edited(models[0], tmp_path / "w", lambda t: t.update({n: v for n, v in tensors(Path(models[1])).items()
                                                                   if ".mlp." in n}))  # fmt: skip
    opened = open_model(mix.out) if format_ == "auto" else load_model(mix.out, loading=Loading("cpu"))
    assert gap(logits(opened), logits(open_model(wanted))) <= EQUAL


def test_types_of_the_output(tmp_path, mix, llamas):
    mix(llamas[:2], router="random", dtype="bf16")
    assert {t.dtype for t in tensors(mix.out).values()} == {torch.bfloat16}
    assert json.loads((mix.out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    mix(llamas[:2], router="random", dtype="bf16", level="block")
    kinds = {n: t.dtype for n, t in tensors(mix.out).items()}
    assert {k for n, k in kinds.items() if ".gate." in n} == {torch.float32}
    assert {k for n, k in kinds.items() if ".gate." not in n} == {torch.bfloat16}
    half = write_model(tmp_path / "half", 7, dtype=torch.bfloat16)
    mix([llamas[0], half], router="random")  # experts take the type of the base
    assert {t.dtype for t in tensors(mix.out).values()} == {torch.float32}


def test_an_adapter_as_expert(tmp_path, mix, llamas):
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["up_proj", "q_proj"])
    model = get_peft_model(open_model(llamas[0]), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    outcome = mix([llamas[0], f"{llamas[0]}+{tmp_path / 'adapter'}"], router="random")
    assert outcome.details["experts"] == ["a", "adapter"]
    w3 = tensors(mix.out)["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    torch.testing.assert_close(w3, merged["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(w3, tensors(mix.out)["model.layers.0.block_sparse_moe.experts.0.w3.weight"])


def test_models_that_do_not_fit_are_refused_with_names_values_and_a_way_out(tmp_path, mix, llamas):
    small = write_model(tmp_path / "small", 0, hidden_size=16)
    with pytest.raises(IncompatibleModelsError) as error:
        mix([llamas[0], small], router="random")
    told = str(error.value)
    assert told.startswith(f"cannot mix {llamas[0]} with {small}: hidden_size is 32 and 16; at level ffn")
    assert "level: model" in told
    theta = write_model(tmp_path / "theta", 0, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(IncompatibleModelsError, match="rope_parameters is"):
        mix([llamas[0], theta], router="random", level="block")
    words = tmp_path / "words"
    shutil.copytree(llamas[1], words)
    text = (words / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    document = json.loads(text)
    document["model"]["vocab"][one], document["model"]["vocab"][two] = vocabulary[two], vocabulary[one]
    (words / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(IncompatibleModelsError, match="token id"):
        mix([llamas[0], str(words)], router="random")


def test_a_head_of_its_own_is_no_obstacle_for_an_expert(tmp_path, mix, llamas):
    """Only the base's embeddings and head are used."""
    tied = write_model(tmp_path / "tied", 4, tie_word_embeddings=True)
    for base, has_head in ((tied, False), (llamas[0], True)):
        outcome = mix([llamas[1], tied], base_model=base, router="random")
        assert checks_pass(outcome)
        assert ("lm_head.weight" in tensors(mix.out)) == has_head
        assert AutoConfig.from_pretrained(mix.out).tie_word_embeddings != has_head


def test_mixtures_are_no_experts(mix, llamas):
    mix(llamas[:2], router="random")
    with pytest.raises(IncompatibleModelsError, match="is a mixture of experts itself"):
        mix([str(mix.out), llamas[0]], router="random", level="model")


@pytest.mark.parametrize(
    ("family", "more", "format_", "told"),
    [
        ("llama", {"attention_bias": True}, "mixtral", "attention_bias is set in the base"),
        ("llama", {"mlp_bias": True}, "qwen2_moe", "mlp_bias is set in the base"),
        ("llama", {}, "qwen3_moe", "it holds qwen3 models, and the base is llama"),
        ("qwen2", {}, "mixtral", "it holds llama and mistral models, and the base is qwen2"),
        ("mistral", {"sliding_window": 8}, "qwen2_moe", "sliding window in all layers"),
    ],
)
def test_a_format_that_cannot_hold_it_is_refused_with_the_reason(tmp_path, mix, family, more, format_, told):
    model = write_model(tmp_path / "m", 0, family, **more)
    with pytest.raises(ConfigError) as error:
        mix([model] * 2, router="random", format=format_)
    assert told in str(error.value)
    outcome = mix([model] * 2, router="random")  # auto finds one that can
    assert checks_pass(outcome)


def test_damaged_weights_end_the_run(tmp_path, mix, llamas):
    bad = edited(
        llamas[1], tmp_path / "bad", lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(float("nan"))
    )
    with pytest.raises(NotFiniteError, match="up_proj"):
        mix([llamas[0], bad], router="random")


def test_whole_models_of_any_shape(tmp_path, mix, llamas, stories260k):
    """Every tensor is there under its expert's number, tokenizers beside; the encoder is cut to what is read."""
    other = write_model(tmp_path / "other", 3, "qwen2", hidden_size=16, num_hidden_layers=2)
    experts = [{"model": m, "prompts": [p]} for m, p in ((str(stories260k), "Once upon a time"), (other, "def f(x):"))]
    outcome = mix(experts, level="model", base_model=llamas[2])
    assert checks_pass(outcome)
    assert outcome.details["format"] == "honeloom_models"
    assert outcome.details["utilisation"] == [0.5, 0.5]
    assert [d["shares"] for d in outcome.details["domains"]] == [[1.0, 0.0], [0.0, 1.0]]
    config = json.loads((mix.out / "config.json").read_text())
    assert [e["name"] for e in config["experts"]] == ["stories260k", "other"]
    assert config["encoder"]["expert"] is None
    assert config["encoder"]["config"]["num_hidden_layers"] == config["router"]["layer"] + 1 == 1
    found = tensors(mix.out)
    source = tensors(Path(other))
    assert torch.equal(found["experts.1.model.norm.weight"], source["model.norm.weight"])
    encoder = {n.removeprefix("encoder.") for n in found if n.startswith("encoder.")}
    assert encoder == {n for n in tensors(Path(llamas[2])) if ".layers.0." in n or "embed_tokens" in n}
    for name in ("stories260k", "other", "encoder"):
        assert (mix.out / "tokenizers" / name / "tokenizer.json").is_file()
    opened = load_model(mix.out, loading=Loading("cpu"))
    assert gap(logits(opened.experts[1]), logits(open_model(other))) <= EQUAL
    prompt = list(load_tokenizer_ids(mix.out, "Once upon a time"))
    assert opened.choose([prompt]) == [0]


def load_tokenizer_ids(folder, text):
    from honeloom.backends.hf.chat import Encoder
    from honeloom.backends.hf.load import load_tokenizer
    from honeloom.types.rows import Row, Turn, Where

    row = Row("p", "chat", Where("p", 1), "p", turns=(Turn("user", text),))
    return Encoder(load_tokenizer(folder), 128).prompt_ids(row)


def test_an_encoder_among_the_experts_is_not_stored_twice(mix, llamas):
    mix(llamas[:2], level="model", router="random", encoder_layer=-1)
    config = json.loads((mix.out / "config.json").read_text())
    assert config["encoder"]["expert"] == 0
    assert config["encoder"]["tokenizer"] == "tokenizers/a"
    assert not any(n.startswith("encoder.") for n in tensors(mix.out))
    load_model(mix.out, loading=Loading("cpu"))
    with pytest.raises(ConfigError, match="has layers 0 to 2"):
        mix(llamas[:2], level="model", router="random", encoder_layer=3)


@pytest.mark.parametrize(
    ("level", "more"),
    [("ffn", {}), ("ffn", {"router_input": "sample"}), ("block", {}), ("model", {"dense_layers": 1}), ("model", {})],
)
def test_rows_go_to_the_expert_of_their_domain(tmp_path, mix, llamas, level, more):
    rows = [write_rows(tmp_path / f"{w}.jsonl", w) for w in ("mill", "Count")]
    experts = [{"model": m, "rows": r} for m, r in zip(llamas[:2], rows, strict=True)]
    outcome = mix(experts, level=level, router="rows", top_k=1, format="honeloom", **more)
    assert checks_pass(outcome)
    assert outcome.details["router"]["accuracy"] > 0.8
    shares = {d["domain"]: d["shares"] for d in outcome.details["domains"]}
    assert shares["mill"][0] > 0.6
    assert shares["Count"][1] > 0.6
    assert any("gates name the right expert" in line for line in mix.said)
    assert (mix.out / "calibration_rows.parquet").is_file()


def test_rows_without_labels_go_to_the_expert_of_least_loss(tmp_path, mix, llamas):
    rows = [write_rows(tmp_path / f"{w}.jsonl", w) for w in ("mill", "Count")]
    outcome = mix(llamas[:2], router={"type": "clusters", "rows": rows}, level="block")
    assert checks_pass(outcome)
    shares = {d["domain"]: d["shares"] for d in outcome.details["domains"]}
    assert abs(shares["mill"][0] - shares["Count"][0]) > 0.6
    outcome = mix(llamas[:2], router={"type": "rows", "rows": rows}, level="model")
    assert any("rows by the expert of least loss" in line for line in mix.said)


def test_smile_needs_task_vectors(tmp_path, mix, llamas):
    """Each expert differs from the base in one direction of its MLPs' input."""

    def change(column):
        def apply(found):
            for name in found:
                if "gate_proj" in name or "up_proj" in name:
                    found[name][:, column] += 1.0

        return apply

    experts = [edited(llamas[0], tmp_path / f"e{c}", change(c)) for c in (3, 8)]
    outcome = mix(experts, base_model=llamas[0], router={"type": "smile", "rank": 1}, top_k=1)
    assert checks_pass(outcome)
    basis = tensors(mix.out)["trunk.model.layers.0.mlp.gate.basis"]
    assert basis.shape == (2, 1, 32)
    assert basis[:, 0].abs().argmax(dim=1).tolist() == [3, 8]
    gpt = [write_model(tmp_path / f"g{s}", s, "gpt2", n_embd=32, n_layer=2, n_head=4) for s in (0, 1)]
    with pytest.raises(ConfigError, match="has no matrix stored as"):
        mix([gpt[1]], base_model=gpt[0], router="smile")


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        ({}, "nats per token"),
        ({"top_k": 1}, "nats per token"),
        ({"level": "block", "gate": "mlp", "gate_width": 8}, "nats per token"),
        ({"level": "model", "dense_layers": 1}, "nats per token"),
        ({"level": "model"}, "nats per character"),
    ],
)
def test_tuning_changes_the_gates_alone(tmp_path, mix, llamas, settings, unit):
    rows = write_rows(tmp_path / "r.jsonl", "mill")
    plain = {k: v for k, v in settings.items() if k not in ("gate", "gate_width")}
    mix(llamas[:2], router="random", **plain)
    before = tensors(mix.out)
    tune = {"steps": 12, "rows": rows, "lr": 0.05, "batch_size": 8}
    outcome = mix(llamas[:2], router="random", tune_router=tune, **settings)
    assert checks_pass(outcome)
    after = tensors(mix.out)
    assert all(torch.equal(before[n], after[n]) for n in before if "gate." not in n)
    changed = [n for n in after if "gate." in n and (n not in before or not torch.equal(before[n], after[n]))]
    assert changed
    tuned = outcome.details["tuned"]
    assert (tuned["steps"], tuned["unit"], len(tuned["losses"])) == (12, unit, 12)
    assert sum(tuned["losses"][-4:]) < sum(tuned["losses"][:4])


def test_a_model_without_tokenizer_can_be_mixed_at_random_alone(tmp_path, mix, llamas):
    bare = [shutil.copytree(m, tmp_path / Path(m).name) for m in llamas[:2]]
    for folder in bare:
        (folder / "tokenizer.json").unlink()
    outcome = mix([str(f) for f in bare], router="random")
    assert checks_pass(outcome)
    assert "no tokenizer" in outcome.checks[0].claim
    with pytest.raises(SourceError, match="no tokenizer, so it cannot read rows"):
        mix([{"model": str(f), "prompts": ["x"]} for f in bare])


def test_memory_that_is_not_enough_is_refused(tmp_path, mix, llamas):
    with pytest.raises(ConfigError, match="writing a mixture takes at least"):
        mix(llamas[:2], router="random", max_memory=1 << 20)
    rows = write_rows(tmp_path / "r.jsonl", "mill")
    with pytest.raises(ConfigError, match="reading rows with"):
        mix([{"model": m, "rows": rows} for m in llamas[:2]], router="rows", max_memory=1 << 20)


def test_a_trunk_with_other_names_on_disk(tmp_path, mix):
    gemma = tmp_path / "g"
    write_model(gemma, 0)
    config = json.loads((gemma / "config.json").read_text())
    (gemma / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    with pytest.raises(CheckpointError):
        mix([str(gemma)] * 2, router="random")


def test_a_real_model(tmp_path, mix, stories260k):
    """Two versions of a real Llama: prompts of each go to it more often than not."""
    other = edited(stories260k, tmp_path / "other", lambda t: [t[n].mul_(1.01) for n in t if "up_proj" in n])
    experts = [
        {"model": str(stories260k), "prompts": ["Once upon a time there was a girl", "The cat sat in the sun"]},
        {"model": other, "prompts": ["Lily said to Tom:", "He ran very fast to the park"]},
    ]
    outcome = mix(experts, top_k=1)
    assert checks_pass(outcome)
    domains = {d["domain"]: d["shares"] for d in outcome.details["domains"]}
    assert domains["prompts of stories260k"][0] > 0.5
    assert domains["prompts of other"][1] > 0.5
    found = open_model(mix.out)
    assert torch.isfinite(logits(found)).all()
    text = found.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 25)
