"""`drop`: profiles, choices, budgets, healing, the cache of importances, the plan, and everything that is refused."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import honeloom
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.importance_passes import PaddedBatch
from honeloom.backends.hf.load import load_model, load_tokenizer
from honeloom.backends.hf.sublayers import locate, silence
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.reader import Checkpoint
from honeloom.data.reader import read_rows
from honeloom.dropping.scores import Unit
from honeloom.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    NotFiniteError,
    OutputExistsError,
    RowsError,
    SourceError,
)
from honeloom.lab.tokenizer import build_tokenizer, write_tokenizer
from honeloom.stages.drop_heal import _streams
from honeloom.stages.inputs import resolve_rows

LAYERS = 5
SIZES = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 3, 7, 11, 2, 8]])


def write_model(folder, model_type="llama", *, change=lambda model: None, **fields):
    """A random model of a few layers with the lab's tokenizer."""
    config = AutoConfig.for_model(model_type, **{**SIZES, "vocab_size": build_tokenizer().get_vocab_size(), **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, 0.15)
    change(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HONELOOM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Attention 3 and the MLP of layer 1 add nothing."""

    def change(model):
        model.model.layers[3].self_attn.o_proj.weight.data.zero_()
        model.model.layers[1].mlp.down_proj.weight.data.zero_()

    return write_model(tmp_path_factory.mktemp("planted"), change=change)


@pytest.fixture
def drop(tmp_path, rows):
    def run(model, name="out", **settings):
        given = {"samples": 12, "measure": 4, "max_length": 48, **settings}
        if "layers" not in given and "scores" not in given:
            given.setdefault("calibration", rows)
        else:
            given.pop("samples"), given.pop("measure"), given.pop("max_length")
        return honeloom.drop(model, tmp_path / name, **given)

    return run


def logits(folder):
    with torch.inference_mode():
        return load_model(folder)(input_ids=IDS, use_cache=False).logits


def silenced_logits(folder, attention, mlp):
    model = load_model(folder)
    silence(model, attention=attention, mlp=mlp)
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def gone(report):
    plan = report.details["plan"]
    return (
        tuple(sorted({*plan["attention"], *plan["block"]})), tuple(sorted({*plan["mlp"], *plan["block"]})),
    )  # fmt: skip


@pytest.mark.parametrize("profile", ["zero", "native", "dropped", "decilm", "gguf"])
def test_every_profile_is_what_the_silenced_source_is(drop, llama, tmp_path, profile):
    report = drop(llama, attention=1, mlp=1, profile=profile, protect_first=1)
    details = report.details
    assert report.status == "ok" and "logits" in report.verification[-1].claim
    assert report.artefact.kind == ("gguf" if profile == "gguf" else "model")
    before, after = ({key: details[key][when] for key in ("params", "kv_bytes_per_token", "flops_per_token")}
                     for when in ("before", "after"))  # fmt: skip
    token = 2 * 2 * 16 * 4
    assert before["kv_bytes_per_token"] == LAYERS * token
    attention, mlp = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 256
    if profile == "zero":
        assert after == before and details["saves"] == []
        assert len(details["zeroed"]) == 2
    else:
        stand_in = 0
        if profile == "gguf" and details["blocks"] and any(m is None for _, m in details["blocks"]):
            stand_in = 64 + 3 * 32 * 64  # an MLP of zeros, and its norm
        assert before["params"] - after["params"] == attention + mlp + 2 * 64 - stand_in
        assert before["flops_per_token"] - after["flops_per_token"] == 2 * (attention + mlp - max(0, stand_in - 64))
        assert after["kv_bytes_per_token"] == (LAYERS - 1) * token
        assert details["decode_bound"][1]["speedup"] > 1
    assert details["loads_in"]
    plan = json.loads((tmp_path / "out" / "drop_plan.json").read_text())
    assert plan == {**details["plan"]} and plan["profile"] == profile and plan["metric"] == "cosine"
    if profile in ("zero", "native", "dropped"):
        assert torch.equal(logits(tmp_path / "out"), silenced_logits(llama, *gone(report)))


def test_units_that_add_nothing_go_first_and_change_nothing(drop, planted, tmp_path):
    report = drop(planted, joint=2, profile="dropped")
    assert sorted(report.details["order"]) == ["attention 3", "mlp 1"]
    assert torch.equal(logits(tmp_path / "out"), logits(planted))
    assert [point["rise"] for point in report.details["curve"]] == pytest.approx([0.0] * 3, abs=1e-6)
    assert report.metric("importance", "attention.3").value == pytest.approx(0.0, abs=1e-6)


def test_rounds_find_them_too_and_greedy_steps_never_cost_more(drop, planted):
    plan = drop(planted, "rounds", attention=1, mlp=1, choice="iterative").details["plan"]
    assert (plan["attention"], plan["mlp"]) == ([3], [1])
    greedy = drop(planted, "greedy", attention=1, mlp=1, choice="greedy")
    assert greedy.details["curve"][-1]["rise"] <= 1e-6  # a random model may even gain by losing a half


def test_all_rounds_at_once_are_the_one_shot_choice(drop, llama):
    once = drop(llama, "once", attention=3)
    rounds = drop(llama, "rounds", attention=3, choice="iterative", per_round=3)
    assert rounds.details["order"] == once.details["order"]


def test_the_curve_is_measured_on_the_same_rows_and_costs_fall(drop, llama):
    report = drop(llama, joint=3, speed_context=8)
    curve = report.details["curve"]
    assert [p["dropped"] for p in curve] == [0, 1, 2, 3] and [p["unit"] for p in curve[1:]] == report.details["order"]
    assert curve[0]["rise"] == 0.0 and curve[-1]["loss"] == report.metric("loss", "dropped").value
    assert curve[0]["loss"] == report.metric("loss", "source").value
    assert curve[-1]["rise"] == pytest.approx(curve[-1]["loss"] - curve[0]["loss"])
    assert [p["params"] for p in curve] == sorted({p["params"] for p in curve}, reverse=True)
    assert all(p["tokens_per_second"] > 0 for p in curve)


def test_budgets_are_kept_and_proven(drop, llama):
    report = drop(llama, budget=["params=80%", "kv_bytes_per_token=60%"], profile="dropped")
    details = report.details
    assert details["params"]["after"] <= 0.8 * details["params"]["before"]
    assert details["kv_bytes_per_token"]["after"] == 0.6 * details["kv_bytes_per_token"]["before"]
    kept = [c for c in report.verification if "budget" in c.claim]
    assert len(kept) == 2 and all(c.passed for c in kept)


@pytest.mark.parametrize("choice", ["one_shot", "iterative", "greedy"])
def test_a_budget_of_the_cache_takes_attention_alone(drop, llama, choice):
    report = drop(llama, budget={"kv_bytes_per_token": "60%"}, choice=choice)
    assert len(report.details["plan"]["attention"]) == 2 and report.details["plan"]["mlp"] == []
    assert "the plan, written by a profile that saves" in report.verification[-1].claim


@pytest.mark.parametrize("choice", ["one_shot", "iterative", "greedy"])
def test_a_loss_increase_is_used_up_and_never_passed(drop, planted, choice):
    report = drop(planted, budget={"loss_increase": "0.0001"}, choice=choice, kinds=["attention", "mlp"])
    assert {"attention 3", "mlp 1"} <= set(report.details["order"])
    assert report.details["curve"][-1]["rise"] <= 0.0001
    assert report.details["curve"][0]["loss"] == report.metric("loss", "source").value


def test_a_loss_increase_beside_numbers_is_a_condition(drop, llama):
    with pytest.raises(ConfigError, match=r"budget loss_increase=1e-09: what is asked for raises the loss from"):
        drop(llama, attention=4, budget={"loss_increase": "1e-9"})


def test_native_choices_are_stock_models(drop, llama, tmp_path):
    report = drop(llama, joint=4, profile="native")
    config = read_config(tmp_path / "out")
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == LAYERS - 2
    assert all(None not in block for block in report.details["blocks"])
    assert torch.equal(logits(tmp_path / "out"), silenced_logits(llama, *gone(report)))


def test_a_run_of_blocks_is_one_run(drop, llama, tmp_path):
    report = drop(llama, block=2, consecutive=True, profile="native")
    first, second = report.details["plan"]["block"]
    assert second == first + 1 and report.details["order"] == [f"block {first} to {second}"]
    assert torch.equal(logits(tmp_path / "out"), silenced_logits(llama, *gone(report)))


def test_layers_by_name_are_dropped_without_scoring(drop, llama, tmp_path):
    settings = {"attention": [-1, 0], "mlp": [False, True, False, False, False], "from_end": True}
    report = drop(llama, layers=settings, profile="dropped")
    assert report.details["plan"]["attention"] == [0, 4] and report.details["plan"]["mlp"] == [1]
    assert not (tmp_path / "out" / "scores.json").exists() and report.details["plan"]["metric"] == "named"
    assert torch.equal(logits(tmp_path / "out"), silenced_logits(llama, (0, 4), (1,)))


def test_drops_of_a_dropped_model_add_up(drop, llama, tmp_path):
    first = drop(llama, "first", attention=1, profile="dropped")
    second = drop(tmp_path / "first", "second", attention=1, mlp=1, profile="dropped")
    spec = read_config(tmp_path / "second")["drop_spec"]
    assert spec["attention"] == sorted(first.details["plan"]["attention"] + second.details["plan"]["attention"])
    assert second.details["kv_bytes_per_token"]["before"] == first.details["kv_bytes_per_token"]["after"]
    scores = json.loads((tmp_path / "second" / "scores.json").read_text())
    assert first.details["plan"]["attention"][0] not in [s["layer"] for s in scores["attention"]]
    assert torch.equal(logits(tmp_path / "second"), silenced_logits(llama, spec["attention"], spec["mlp"]))
    with pytest.raises(ConfigError, match=r"asked 4 attention layers, and the model has 5 \(1 already dropped\)"):
        drop(tmp_path / "first", "third", attention=4)


# Healing


def test_healing_lowers_the_loss_and_is_what_was_trained(drop, llama, tmp_path, make_rows):
    report = drop(llama, attention=3, profile="dropped", heal=make_rows(24, "heal.jsonl"), heal_steps=12, heal_rank=4,
                  heal_lr=5e-3)  # fmt: skip
    healing = report.details["healing"]
    assert healing["loss"]["before"] == report.metric("loss", "dropped").value
    assert healing["loss"]["after"] == report.metric("loss", "healed").value < healing["loss"]["before"]
    assert healing["steps"] == 12 and healing["train_loss"]["last"] < healing["train_loss"]["first"]
    assert (
        report.verification[0].claim.startswith("the merged weights have the loss")
        and report.verification[0].limit == 1e-4
    )
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    with Checkpoint.open(llama) as old, Checkpoint.open(tmp_path / "out") as new:
        attention = report.details["plan"]["attention"]
        assert not [n for n in new.names() for i in attention if n.startswith(f"model.layers.{i}.self_attn")]
        kept = next(i for i in range(LAYERS) if i not in attention)
        name = f"model.layers.{kept}.mlp.up_proj.weight"
        assert not torch.equal(old.read(name), new.read(name))
        assert torch.equal(old.read("model.embed_tokens.weight"), new.read("model.embed_tokens.weight"))


def test_healed_losses_are_those_of_the_rounded_files(tmp_path):
    """The lab's weights are bf16: a step that rounding takes back half of must be told as it is in the files."""
    report = honeloom.drop(
        "lab:base", attention=1, calibration="lab:dev", samples=32, heal="lab:pool", heal_steps=1, heal_lr=1e-3,
        profile="dropped", output_dir=tmp_path / "out",
    )  # fmt: skip
    assert report.verification[0].value < 2e-4
    told = json.loads((tmp_path / "out" / "report.json").read_bytes())["details"]["healing"]["loss"]["after"]
    assert told == report.metric("loss", "healed").value


@pytest.mark.parametrize(("model_type", "fields"), [("llama", {}), ("gpt2", {"n_layer": 4, "n_head": 4, "n_embd": 64})])
def test_scaled_channels_bring_the_stream_closer_to_the_source(drop, tmp_path, rows, model_type, fields):
    """Of the half behind the gap, on the calibration rows: least squares of every channel cannot end up farther."""
    source = write_model(tmp_path / "source", model_type, **fields)
    settings = {"layers": {"mlp": [1]}, "profile": "zero"}
    drop(source, "plain", **settings)
    report = drop(source, "scaled", **settings, affine=True, calibration=rows)
    assert report.details["healing"]["scaled"] == ["attention 2"]
    assert report.verification[0].limit == 1e-4  # what was written computes what was fitted
    models = [load_model(folder) for folder in (source, tmp_path / "plain", tmp_path / "scaled")]
    encoder = Encoder(load_tokenizer(source), 128)
    batch = PaddedBatch.of([encoder.encode(row) for row in read_rows(resolve_rows(str(rows)).files)], models[0].device)
    unit, real = Unit("attention", 2), batch.mask.bool()
    wanted, plain, scaled = (_streams(m, locate(models[0]), unit, batch)[1][real] for m in models)
    assert (scaled - wanted).square().sum() < 0.99 * (plain - wanted).square().sum()


def test_scaling_and_training_add_up(drop, llama, rows):
    report = drop(llama, mlp=1, attention=1, protect_last=1, affine=True, heal=rows, heal_steps=3)
    healing = report.details["healing"]
    assert report.status == "ok" and healing["steps"] == 3 and healing["scaled"]


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("gemma2", {"head_dim": 16}, "whose halves end in a norm"),
        ("olmo2", {}, "whose halves end in a norm"),
        ("gpt_neox", {}, "read the same stream"),
        ("mixtral", {"num_local_experts": 2}, "whose MLPs are experts"),
    ],
)
def test_scaling_is_refused_where_it_would_not_be_exact(drop, tmp_path, model_type, fields, reason):
    with pytest.raises(ConfigError, match=reason):
        drop(write_model(tmp_path / "model", model_type, **fields), mlp=1, affine=True)


# Importances that are kept, and given


def test_importances_are_measured_once(drop, llama, tmp_path, make_rows, monkeypatch):
    first = drop(llama, "first", attention=1)
    again = drop(llama, "again", joint=3, profile="dropped")
    assert not first.details["scores_reused"] and again.details["scores_reused"]
    read = {name: json.loads((tmp_path / name / "scores.json").read_text()) for name in ("first", "again")}
    assert read["first"] == read["again"]
    for changed in ({"metric": "magnitude"}, {"max_length": 8}, {"samples": 3},
                    {"calibration": make_rows(13, "more.jsonl")}, {"seed": 1, "samples": 3}):  # fmt: skip
        assert not drop(llama, f"other{len(list(tmp_path.iterdir()))}", attention=1, **changed).details["scores_reused"]
    for file in (tmp_path / "cache" / "importances").iterdir():
        file.write_text("{")
    assert not drop(llama, "damaged", attention=2).details["scores_reused"]


def test_another_model_at_the_same_path_is_scored_anew(drop, tmp_path):
    folder = write_model(tmp_path / "model")
    first = drop(folder, "first", attention=1)

    def change(model):
        for parameter in model.parameters():
            parameter.data *= 1.5

    write_model(folder, change=change)
    second = drop(folder, "second", attention=1)
    assert not second.details["scores_reused"]
    assert second.metric("importance", "mlp.2").value != first.metric("importance", "mlp.2").value


def test_a_plan_tells_the_decision_once_importances_are_known(drop, llama, tmp_path, rows):
    given = {"calibration": rows, "samples": 12, "measure": 4, "max_length": 48}
    before = honeloom.plan("drop", model=llama, joint=3, **given)[0]
    assert before.notes == ("importances of these rows are not known yet; the first run measures and keeps them",)
    drop(llama, "first", attention=1)
    held = sorted(p.name for p in tmp_path.iterdir())
    planned = honeloom.plan("drop", model=llama, joint=3, **given)[0]
    report = drop(llama, "second", joint=3)
    plan = report.details["plan"]
    assert f"attention {plan['attention']}, mlp {plan['mlp']}, blocks {plan['block']}" in planned.notes[0]
    assert planned.notes[1] == f"order: {', '.join(report.details['order'])}"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*held, "second"])
    budget = honeloom.plan("drop", model=llama, budget={"params": "80%"}, **given)[0]
    met = drop(llama, "met", budget={"params": "80%"}).details["plan"]
    assert f"attention {met['attention']}, mlp {met['mlp']}" in budget.notes[0]
    assert "would be refused: --attention 5" in honeloom.plan("drop", model=llama, attention=5, **given)[0].notes[0]
    measured = honeloom.plan("drop", model=llama, attention=1, choice="greedy", **given)[0]
    assert "decided by measuring (choice greedy)" in measured.notes[0]
    # The command of a plan is the same job again.
    command = shlex.split(honeloom.plan("drop", model=llama, budget={"params": "80%"}, **given)[0].needs.command)
    assert "budget.params=80%" in command


def test_a_plan_loads_no_engine(llama, rows):
    code = (
        "import sys, json, honeloom\n"
        f"p = honeloom.plan('drop', model={str(llama)!r}, attention=1, calibration={str(rows)!r})\n"
        "print(json.dumps([p[0].notes, sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found)[1] == [] and "not known yet" in json.loads(found)[0][0]


def test_importances_alone_and_taken_by_another_drop(drop, llama, tmp_path):
    alone = drop(llama, "alone", only="scores", metric="magnitude")
    assert alone.artefact.kind == "scores" and not (tmp_path / "alone" / "config.json").exists()
    scores = json.loads((tmp_path / "alone" / "scores.json").read_text())
    assert set(scores) == {"attention", "mlp", "block"} and len(scores["mlp"]) == LAYERS
    assert set(scores["mlp"][0]) == {"layer", "value", "stderr"}
    file = tmp_path / "alone" / "scores.json"
    taken = drop(llama, "taken", joint=3, scores=file, metric="magnitude")
    assert taken.details["order"] == drop(llama, "measured", joint=3, metric="magnitude").details["order"]
    with pytest.raises(ConfigError, match="of the metric magnitude, and metric is cosine; add --metric magnitude"):
        drop(llama, "mismatch", joint=3, scores=file)
    other = tmp_path / "other.json"
    other.write_text('{"attention": [{"layer": 7, "value": 1, "stderr": null}], "mlp": [], "block": []}')
    with pytest.raises(ConfigError, match="of layer 7, and the model has layers 0 to 4"):
        drop(llama, "beyond", attention=1, scores=other)
    other.write_text("[]")
    with pytest.raises(ConfigError, match=r"not the scores\.json of a drop"):
        drop(llama, "none", attention=1, scores=other)


# Refusals: nothing is written, and the message has the value


def quantised(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": None}))


def lost_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with Checkpoint(folder, [folder / "model-00001-of-00002.safetensors"]) as checkpoint:
        names = checkpoint.names()
    places = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def absent_tensor(folder):
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    with Checkpoint(folder, [folder / shard]) as checkpoint:
        places = dict.fromkeys([*checkpoint.names(), "model.layers.9.mlp.up_proj.weight"], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def odd_array(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_scales": [1.0] * LAYERS}))


def short_types(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "no_rope_layers": [1] * (LAYERS - 1)}))


def not_a_number(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "settings", "error", "message"),
    [
        (None, {"attention": 9}, ConfigError, r"asked 9 attention layers, and the model has 5 \(0 already dropped\); "
         r"at least 1 attention must remain; ask for at most 4"),
        (None, {"attention": 5}, ConfigError, "asked 5 attention layers.*ask for at most 4"),
        (None, {"mlp": -1}, ConfigError, "mlp: must be greater than or equal to 0"),
        (None, {"block": 5}, ConfigError, "asked 5 blocks"),
        (None, {"protect_first": 3, "protect_last": 2, "block": 1}, ConfigError, "protect_first 3 and protect_last 2"),
        (None, {"layers": {"attention": [5]}}, ConfigError, r"layers\.attention: there is no layer 5"),
        (None, {"layers": {"mlp": [2, 2]}}, ConfigError, r"layers\.mlp: layer 2 is named twice"),
        (None, {"layers": {"mlp": [-1]}}, ConfigError, r"-1 is below 0.*layers\.from_end"),
        (None, {"layers": {"block": [True] * 4}}, ConfigError, "4 times true or false, and the model has 5 layers"),
        (None, {"layers": {"block": [1], "mlp": [1]}}, ConfigError, "layer 1 is named for another drop too"),
        (None, {"layers": {"attention": [0, 1, 2, 3, 4]}}, ConfigError, "all 5 attentions would be gone"),
        (None, {"layers": {"mlp": []}}, ConfigError, "layers names no layer"),
        (None, {"layers": {"attention": [1]}, "profile": "native"}, ConfigError, "MLP of layer 1 would stay alone"),
        (None, {"budget": {"kv_bytes_per_token": "1%"}}, ConfigError, "no choice of what may go reaches that"),
        (None, {"attention": 1, "calibration": "EMPTY"}, RowsError, "no calibration row|no rows|empty"),
        (quantised, {"attention": 1}, CheckpointError, r"quantised \(gptq\).*--only scores.*--scores"),
        (adapter, {"attention": 1}, Exception, "adapter"),
        (lost_shard, {"attention": 1}, CheckpointError, "model-00002-of-00002.safetensors.*not there"),
        (absent_tensor, {"attention": 1}, CheckpointError, r"model\.layers\.9\.mlp\.up_proj\.weight"),
        (pickled, {"attention": 1}, CheckpointError, "is pickled.*honeloom convert"),
        (odd_array, {"block": 1, "profile": "native"}, CheckpointError, "head_scales has as many entries as there are"),
        (short_types, {"block": 1, "profile": "native"}, CheckpointError, "no_rope_layers has 4 entries for 5 layers"),
        (not_a_number, {"attention": 1}, NotFiniteError, r"mlp of layer 2 is the first.*batch 0 \(float32\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_leaves_nothing(drop, llama, tmp_path, spoil, settings, error, message):
    model = llama
    if spoil is not None:
        model = write_model(tmp_path / "model")
        spoil(model)
    if settings.get("calibration") == "EMPTY":
        (tmp_path / "empty.jsonl").write_text("")
        settings = {**settings, "calibration": tmp_path / "empty.jsonl"}
    with pytest.raises(error, match=message):
        drop(model, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "fields", "settings", "message"),
    [
        ("gpt_neox", {}, {"joint": 2, "native": True}, "read the same stream.*drop whole blocks"),
        ("qwen3", {"head_dim": 16}, {"attention": 1, "profile": "decilm"}, "a qwen3 is not of the families"),
        ("bloom", {"n_layer": 2, "n_head": 4}, {"attention": 1}, "with attention and MLP silenced it must return its"),
    ],
)
def test_families_that_cannot_are_refused_before_anything_is_scored(
    drop, tmp_path, model_type, fields, settings, message
):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        drop(write_model(tmp_path / "model", model_type, **fields), **settings)
    assert not (tmp_path / "cache").exists()


def test_blocks_of_parallel_halves_go_natively(drop, tmp_path):
    model = write_model(tmp_path / "model", "gpt_neox")
    report = drop(model, block=2, profile="native")
    assert read_config(tmp_path / "out")["num_hidden_layers"] == LAYERS - 2
    assert torch.equal(logits(tmp_path / "out"), silenced_logits(model, *gone(report)))


def test_an_unlisted_family_is_dropped_by_what_is_found_in_it(drop, tmp_path):
    model = write_model(tmp_path / "model", "opt", ffn_dim=64, word_embed_proj_dim=64, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="heal: a opt is not a listed family"):
        drop(model, attention=1, heal=tmp_path / "rows.jsonl")
    report = drop(model, attention=1, mlp=1, profile="dropped")
    assert report.details["params"]["after"] < report.details["params"]["before"]
    assert torch.equal(logits(tmp_path / "out"), silenced_logits(model, *gone(report)))


def test_gguf_names_its_extra_before_any_work(drop, llama, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'honeloom\[gguf\]'"):
        drop(llama, attention=1, profile="gguf")


def test_fewer_rows_than_asked_for_are_told(drop, llama):
    report = drop(llama, attention=1, samples=50)
    assert any("samples 50 are asked for, and there are 12 rows of" in w for w in report.warnings)


def test_a_folder_with_something_else_stays(drop, llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        drop(llama, attention=1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_model_without_tokenizer_is_scored_on_seeded_ids(drop, tmp_path):
    model = write_model(tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    for file in model.glob("*.jinja"):
        file.unlink()
    with pytest.raises(SourceError, match="no tokenizer, so it cannot be healed"):
        drop(model, attention=1, heal=tmp_path / "rows.jsonl")
    report = drop(model, attention=1, profile="dropped")
    assert any("no tokenizer" in w for w in report.warnings)
    assert [p["loss"] for p in report.details["curve"]] == [None, None]


def test_a_model_of_profile_zero_is_dropped_again(drop, llama, tmp_path):
    """Halves of zeros in the first layer make the other half's norm look idle there, and in no other layer."""
    drop(llama, "first", layers={"mlp": [0]})
    report = drop(tmp_path / "first", "second", attention=1, mlp=1)
    assert report.status == "ok" and report.details["plan"]["mlp"] == [0]
