"""Settings of `mix`: defaults, names, and every contradiction refused with its reason; mergekit-moe's words."""

from __future__ import annotations

import pytest

from honeloom.config.base import validate
from honeloom.errors import ConfigError
from honeloom.mixture.config import MixConfig
from honeloom.mixture.mergekit_moe import differences

PROMPTED = [{"model": "org/a", "prompts": ["x"]}, {"model": "org/b", "prompts": ["y"]}]
TUNE = {"steps": 3, "rows": "r.jsonl"}


def read(**settings):
    return validate(MixConfig, settings, what="mix")


def test_defaults():
    config = read(experts=PROMPTED)
    assert (config.level, config.chosen, config.input, config.router.type) == ("ffn", 2, "token", "prompts")
    assert not config.whole_models
    block = read(experts=PROMPTED, level="block")
    assert (block.chosen, block.input) == (1, "sample")
    assert read(experts=PROMPTED, level="model").whole_models
    assert not read(experts=PROMPTED, level="model", dense_layers=1).whole_models
    assert read(experts=["org/a"], router="random").chosen == 1


def test_names_come_from_paths_and_are_made_unique():
    experts = ["org/a", "/x/a", "org/base@main", "org/b+lora/math tuned", {"model": "x", "name": "a-2"}]
    assert read(experts=experts, router="random").names == ("a", "a-2", "base", "math-tuned", "a-2-2")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"experts": []}, "experts: must not be empty"),
        ({"experts": PROMPTED, "lvel": "ffn"}, "unknown key 'lvel'; did you mean 'level'"),
        ({"experts": PROMPTED, "top_k": 3}, "top_k 3: there are 2 experts"),
        ({"experts": PROMPTED, "level": "model", "top_k": 2}, "one decision for one model"),
        ({"experts": PROMPTED, "level": "block", "router_input": "token"}, "chosen for a whole sample"),
        ({"experts": PROMPTED, "level": "block", "shared_expert": "s"}, "exists at level ffn alone"),
        ({"experts": PROMPTED, "encoder": "e"}, "encoder: only level model with dense_layers 0"),
        ({"experts": PROMPTED, "level": "model", "dense_layers": 2, "encoder_layer": 1}, "encoder_layer: only level"),
        ({"experts": PROMPTED, "level": "block", "format": "mixtral"}, "format mixtral: it routes every token to MLPs"),
        ({"experts": PROMPTED, "format": "mixtral", "router_input": "sample"}, "router_input sample"),
        ({"experts": PROMPTED, "format": "mixtral", "shared_expert": "s"}, "it has no shared expert"),
        ({"experts": PROMPTED, "gate": "mlp"}, "no router gives a hidden layer without training"),
        ({"experts": PROMPTED, "gate": "mlp", "tune_router": TUNE, "format": "mixtral"}, "has linear gates alone"),
        ({"experts": PROMPTED, "gate": "mlp", "tune_router": TUNE, "gate_width": 3}, "must be at least 4"),
        ({"experts": PROMPTED, "gate_width": 8}, "a linear gate has no hidden layer"),
        ({"experts": PROMPTED, "tune_router": {"steps": 3}}, "steps and rows go together"),
        ({"experts": PROMPTED, "tune_router": {"rows": "r"}}, "steps and rows go together"),
        ({"experts": ["a", "b"]}, "experts.0.prompts: router prompts needs some of every expert"),
        ({"experts": PROMPTED, "router": "random"}, "experts.0.prompts: router random does not look at them"),
        ({"experts": [{"model": "a", "negative_prompts": ["n"]}], "router": "random"}, "negative_prompts: router"),
        ({"experts": ["a", "b"], "router": "rows"}, "experts.0.rows: router rows needs some"),
        ({"experts": [{"model": "a", "rows": "r"}], "router": {"type": "rows", "rows": "u"}}, "does not look at them"),
        ({"experts": ["a", "b"], "router": "clusters"}, "rows"),
        ({"experts": ["a", "b"], "router": "smile"}, "router smile needs base_model"),
        ({"experts": ["a", "b"], "router": "smile", "base_model": "o", "level": "block"}, "at level block take"),
        ({"experts": ["a", "b"], "router": "smile", "base_model": "o", "format": "mixtral"}, "linear gates alone"),
        (
            {"experts": ["a", "b"], "router": "smile", "base_model": "o", "gate": "mlp", "tune_router": TUNE},
            "its gate is a subspace",
        ),
        ({"experts": PROMPTED, "level": "block", "router": {"pooling": "last"}}, "sees the mean of the prompt"),
        ({"experts": PROMPTED, "router": "hidden"}, "unknown routing method 'hidden'"),
        ({"experts": [{"model": "a", "name": "../x", "prompts": ["x"]}]}, "letters, digits"),
        ({"experts": [{**e, "name": "same"} for e in PROMPTED]}, "two experts have the name 'same'"),
        ({"experts": PROMPTED, "max_memory": "2 XB"}, "a size is a number of bytes"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_their_reason(settings, told):
    with pytest.raises(ConfigError) as error:
        read(**settings)
    assert told in str(error.value)


MERGEKIT = {
    "base_model": "org/base", "gate_mode": "hidden", "dtype": "bfloat16", "experts_per_token": 2,
    "experts": [
        {"source_model": "org/a", "positive_prompts": ["code"], "negative_prompts": ["story"]},
        {"source_model": {"model": "org/b", "lora": "org/lora"}, "positive_prompts": ["story"]},
    ],
}  # fmt: skip


def test_a_mergekit_file_is_read():
    config = read(**MERGEKIT)
    assert config.base_model == "org/base"
    assert [e.model for e in config.experts] == ["org/a", "org/b+org/lora"]
    assert config.experts[0].negative_prompts == ("story",)
    assert (config.router.type, config.router.pooling) == ("prompts", "last")
    assert (config.dtype, config.top_k, config.source_format) == ("bf16", 2, "mergekit")
    told = " ".join(differences(config))
    assert "after the norm before the MLP" in told
    assert "the mean over the experts" in told
    assert differences(read(experts=PROMPTED)) == []


def test_mergekit_gates_and_architectures():
    assert read(**{**MERGEKIT, "gate_mode": "hidden_avg"}).router.pooling == "mean"
    random = read(**{**MERGEKIT, "gate_mode": "random"})
    assert random.router.type == "random"
    assert random.experts[0].prompts == ()  # a random gate does not look at them
    assert read(**{**MERGEKIT, "architecture": "mixtral"}).format == "mixtral"
    shared = read(**{**MERGEKIT, "shared_experts": [{"source_model": "org/s"}], "architecture": "qwen"})
    assert (shared.shared_expert, shared.format) == ("org/s", "qwen2_moe")
    assert any("doubled" in line for line in differences(shared))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gate_mode": "cheap_embed"}, "gate_mode cheap_embed: it compares embeddings"),
        ({"gate_mode": "uniform_random"}, "take random"),
        ({"gate_mode": "magic"}, "must be one of hidden, hidden_avg"),
        ({"architecture": "deepseek"}, "low-rank projections"),
        ({"architecture": "falcon"}, "must be one of mixtral"),
        ({"shared_experts": [{"source_model": "s"}] * 2}, "2 are given; there can be one"),
        ({"shared_experts": [{"source_model": "s", "residual_scale": 0.1}]}, "shared_experts.0.residual_scale 0.1"),
        ({"experts": [{"source_model": "a", "positive_prompts": ["x"], "noise_scale": 0.1}]}, "experts.0.noise_scale"),
        ({"experts": [{"source_model": "a", "prompts": ["x"]}]}, "unknown key 'prompts'"),
        ({"experts": ["a"]}, "must be a mapping with source_model"),
        ({"experts": [{"source_model": {"model": "a", "x": 1}, "positive_prompts": ["x"]}]}, "'x' has no counterpart"),
    ],
)
def test_what_a_mergekit_file_cannot_have_is_refused_by_name(change, told):
    with pytest.raises(ConfigError) as error:
        read(**{**MERGEKIT, **change})
    assert told in str(error.value)
