"""Profiles zero, dropped and decilm: which tensors, which config, what is refused; and drops that add up."""

import json

import pytest
import torch
from export_models import plan_of, save_model, written

from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export.decilm import ffn_mult, ffn_width
from honeloom.errors import CheckpointError, ConfigError

WIDE = {"hidden_size": 64, "intermediate_size": 256}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), **WIDE)


def names_of(folder):
    with Checkpoint.open(folder) as checkpoint:
        return set(checkpoint.names())


def test_zero_keeps_all_tensors_and_only_silences_output_projections(llama, tmp_path):
    plan = written(llama, tmp_path, "zero", attention=[1], block=[3])
    zeros = {t.name for t in plan.tensors if t.source is None}
    assert zeros == {
        "model.layers.1.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    }  # fmt: skip
    assert plan.saves == () and names_of(tmp_path) == names_of(llama)
    assert read_config(tmp_path) == read_config(llama)
    with Checkpoint.open(llama) as old, Checkpoint.open(tmp_path) as new:
        for name in old.names():
            expected = torch.zeros_like(old.read(name)) if name in zeros else old.read(name)
            assert torch.equal(new.read(name), expected)


def test_dropped_leaves_out_halves_with_their_norms(llama, tmp_path):
    plan = written(llama, tmp_path, "dropped", attention=[1], block=[3])
    lost = names_of(llama) - names_of(tmp_path)
    assert lost == {
        n for n in names_of(llama)
        if n.startswith(("model.layers.1.self_attn", "model.layers.1.input_layernorm", "model.layers.3."))
    }  # fmt: skip
    config = read_config(tmp_path)
    assert config["model_type"] == "honeloom_dropped" and config["base"] == read_config(llama)
    assert (config["drop_spec"]["attention"], config["drop_spec"]["mlp"]) == ([1, 3], [3])
    assert config["auto_map"]["AutoModelForCausalLM"] == "honeloom_dropped.HoneloomDroppedForCausalLM"
    assert "import honeloom" not in (tmp_path / "honeloom_dropped.py").read_text()
    assert config["vocab_size"] == 97 and "transformers with trust_remote_code" in plan.loads_in
    with Checkpoint.open(llama) as old:
        saved = sum(old.info(n).elements for n in lost)
        # d*e*(2h + 2g) + d for an attention, 3*d*f + d for an MLP
        assert saved == 2 * (64 * 16 * (2 * 4 + 2 * 2) + 64) + 3 * 64 * 256 + 64
        assert plan.params == sum(old.info(n).elements for n in old.names()) - saved


def test_a_sharded_export_has_an_index_of_its_own_tensors(llama, tmp_path):
    plan = plan_of(llama, "dropped", attention=[1])
    from honeloom.dropping.export import write_export

    with Checkpoint.open(llama) as checkpoint:
        write_export(tmp_path, checkpoint, plan, shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {t.name for t in plan.tensors} == names_of(tmp_path)
    assert index["metadata"]["total_parameters"] == plan.params


def test_gemma_loses_the_norms_behind_a_half_too(tmp_path):
    gemma = save_model(tmp_path, "gemma2", head_dim=8)
    kept = {t.name for t in plan_of(gemma, "dropped", attention=[1], mlp=[2]).tensors}
    lost = {n.removeprefix("model.layers.") for n in names_of(gemma) - kept if "norm" in n}
    assert lost == {
        "1.input_layernorm.weight", "1.post_attention_layernorm.weight",
        "2.pre_feedforward_layernorm.weight", "2.post_feedforward_layernorm.weight",
    }  # fmt: skip


def test_olmo_norms_stand_behind_the_halves(tmp_path):
    olmo = save_model(tmp_path, "olmo2")
    kept = {t.name for t in plan_of(olmo, "dropped", attention=[1], mlp=[2]).tensors}
    lost = {n.removeprefix("model.layers.") for n in names_of(olmo) - kept if "layernorm" in n}
    assert lost == {"1.post_attention_layernorm.weight", "2.post_feedforward_layernorm.weight"}


def test_experts_go_as_a_whole(tmp_path):
    mixtral = save_model(tmp_path, "mixtral", num_local_experts=4)
    lost = names_of(mixtral) - {t.name for t in plan_of(mixtral, "dropped", mlp=[2]).tensors}
    assert len([n for n in lost if "experts" in n]) == 12 and any("gate" in n for n in lost)
    assert all(n.startswith("model.layers.2.") for n in lost)


@pytest.mark.parametrize("profile", ["dropped", "zero", "native"])
def test_drops_of_a_dropped_model_add_up(llama, tmp_path, profile):
    written(llama, tmp_path / "once", "dropped", attention=[2])
    again = written(tmp_path / "once", tmp_path / "twice", profile, mlp=[1])
    direct = written(llama, tmp_path / "direct", profile, attention=[2], mlp=[1])
    assert read_config(tmp_path / "twice") == read_config(tmp_path / "direct")
    assert names_of(tmp_path / "twice") == names_of(tmp_path / "direct")
    assert again.params == direct.params and again.blocks == direct.blocks


def test_a_dropped_model_without_its_record_is_refused(llama, tmp_path):
    written(llama, tmp_path, "dropped", attention=[2])
    config = read_config(tmp_path)
    del config["drop_spec"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="needs base and drop_spec"):
        plan_of(tmp_path, "zero", attention=[1])


def test_every_width_comes_back_through_the_runtimes_rule():
    for hidden in (512, 640, 768, 1024, 2048, 3072, 4096, 5120, 6144, 8192):
        for k in range(1, 201):
            assert ffn_width(ffn_mult(256 * k, hidden), hidden) == 256 * k
    assert ffn_mult(14336, 4096) == 5.25
    for width in (0, 100, 11000):
        with pytest.raises(ConfigError, match=rf"intermediate_size is {width}"):
            ffn_mult(width, 4096)


def test_decilm_says_of_each_block_what_it_lacks(llama, tmp_path):
    written(llama, tmp_path, "decilm", attention=[1], mlp=[3])
    config = read_config(tmp_path)
    blocks = config["block_configs"]
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert [b["attention"]["no_op"] for b in blocks] == [False, True, False, False]
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [2, None, 2, 2]
    assert [b["ffn"]["no_op"] for b in blocks] == [False, False, False, True]
    assert [b["ffn"]["ffn_mult"] for b in blocks] == [6.0, 6.0, 6.0, None]
    names = names_of(tmp_path)
    assert "model.layers.1.input_layernorm.weight" not in names
    assert "model.layers.1.post_attention_layernorm.weight" in names
    assert not any(n.startswith(("model.layers.1.self_attn", "model.layers.3.mlp")) for n in names)


def test_decilm_renumbers_what_pairs_up(llama):
    assert plan_of(llama, "decilm", attention=[2], mlp=[1]).config["num_hidden_layers"] == 3


def test_biases_of_queries_keys_and_values_have_a_switch(tmp_path):
    plan = plan_of(save_model(tmp_path, "qwen2", **WIDE), "decilm", attention=[1])
    assert plan.config["qkv_bias"] is True and plan.config["attention_bias"] is False
    assert "tensorrt-llm" not in plan.loads_in


@pytest.mark.parametrize(
    ("model_type", "fields", "drops", "message"),
    [
        ("llama", WIDE, {"attention": [0]}, "first block would have no attention"),
        ("llama", {**WIDE, "intermediate_size": 200}, {"attention": [1]}, "intermediate_size is 200"),
        ("llama", {**WIDE, "head_dim": 8}, {"attention": [1]}, "head_dim is 8"),
        ("llama", {**WIDE, "hidden_act": "gelu"}, {"attention": [1]}, "hidden_act is 'gelu'"),
        ("qwen3", WIDE, {"attention": [1]}, "a qwen3 is not of the families"),
        ("gemma2", {**WIDE, "head_dim": 16}, {"attention": [1]}, "a gemma2 is not of the families"),
        (
            "llama",
            {**WIDE, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            {"attention": [1]},
            "rope_type is 'linear'",
        ),
    ],
    ids=["first", "width", "heads", "activation", "qwen3", "gemma2", "rope"],
)
def test_decilm_refuses_what_it_cannot_say(tmp_path, model_type, fields, drops, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(save_model(tmp_path, model_type, **fields), "decilm", **drops)


def test_a_sliding_window_limits_the_context(tmp_path):
    model = save_model(tmp_path, "mistral", **WIDE, sliding_window=16)
    plan = plan_of(model, "decilm", attention=[1])
    assert plan.config["max_position_embeddings"] == 16
    assert "sliding window of 16 tokens" in plan.notes[0]
