"""Profile native: names, and every field of the config that speaks of layers."""

import pytest
from export_models import plan_of, save_model, written

from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export.native import repaired_fields
from honeloom.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def test_halves_are_renamed_into_blocks(llama, tmp_path):
    plan = written(llama, tmp_path, "native", attention=[2], mlp=[1])
    assert plan.blocks == ((0, 0), (1, 2), (3, 3))
    taken = {t.name: t.source for t in plan.tensors}
    assert taken["model.layers.1.self_attn.q_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert taken["model.layers.1.input_layernorm.weight"] == "model.layers.1.input_layernorm.weight"
    assert taken["model.layers.1.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert taken["model.layers.1.post_attention_layernorm.weight"] == "model.layers.2.post_attention_layernorm.weight"
    config = read_config(tmp_path)
    assert config["num_hidden_layers"] == 3 and config["model_type"] == "llama"
    with Checkpoint.open(tmp_path) as new, Checkpoint.open(llama) as old:
        assert len(new.names()) == len(old.names()) - 9  # a layer's worth of tensors
        assert plan.params == sum(new.info(n).elements for n in new.names())
        assert plan.params < sum(old.info(n).elements for n in old.names())


def test_halves_that_would_stay_alone_are_named(llama):
    with pytest.raises(ConfigError, match=r"MLP of layer 2 would stay alone.*--profile dropped"):
        plan_of(llama, "native", attention=[2])
    with pytest.raises(ConfigError, match=r"attention of layer 3 would stay alone"):
        plan_of(llama, "native", mlp=[3])


def test_parallel_halves_are_never_paired_anew(tmp_path):
    neox = save_model(tmp_path, "gpt_neox", rotary_pct=1.0)
    with pytest.raises(ConfigError, match=r"attention of layer 1, MLP of layer 2 would stay alone"):
        plan_of(neox, "native", attention=[2], mlp=[1])
    assert plan_of(neox, "native", block=[1]).blocks == ((0, 0), (2, 2), (3, 3))


def test_types_of_attention_follow_the_attention(tmp_path):
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = save_model(tmp_path, "qwen2", layer_types=types, use_sliding_window=True, sliding_window=8)
    plan = plan_of(model, "native", attention=[2], mlp=[1])
    assert plan.config["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]


def test_fields_of_the_mlp_follow_the_mlp():
    config = {"num_hidden_layers": 4, "mlp_only_layers": [2], "layer_types": ["a", "b", "c", "d"]}
    blocks = ((0, 0), (1, 2), (3, 3))
    changes = repaired_fields(config, blocks)
    assert changes == {"num_hidden_layers": 3, "mlp_only_layers": [1], "layer_types": ["a", "b", "d"]}
    nested = repaired_fields({"text_config": {**config, "vocab_size": 5}}, blocks)
    assert nested == {"text_config": {**config, "vocab_size": 5, **changes}}


def test_a_field_of_whole_layers_that_differ_is_refused():
    config = {"num_hidden_layers": 4, "block_configs": ["w", "x", "y", "z"]}
    with pytest.raises(CheckpointError, match="block_configs speaks of a whole layer"):
        repaired_fields(config, ((0, 0), (1, 2), (3, 3)))
    assert repaired_fields(config, ((0, 0), (3, 3)))["block_configs"] == ["w", "z"]


def test_arithmetic_by_the_number_of_the_layer_is_refused(tmp_path):
    model = save_model(tmp_path, "gpt2", n_embd=32, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx"):
        plan_of(model, "native", block=[1])


def test_nothing_may_be_left_without_attention(llama):
    with pytest.raises(CheckpointError, match=r"drops all 4 attentions, and at least 1 must remain"):
        plan_of(llama, "native", block=range(4))
    with pytest.raises(CheckpointError, match=r"no layer 4; it has layers 0 to 3"):
        plan_of(llama, "native", block=[4])
