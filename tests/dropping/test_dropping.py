"""Importance, plans and costs against hand-worked numbers."""

import math

import pytest
import torch

from honeloom.dropping.cosine import cosine
from honeloom.dropping.cost import cache_shape, kv_bytes_per_token, matrix_parameters
from honeloom.dropping.plan import choose_drops, lowest
from honeloom.errors import ConfigError
from honeloom.registry import family
from honeloom.testing import check_drop_metric

STREAMS = [n for n in family("dropping").names() if family("dropping").load_config(n).reads == "streams"]


@pytest.mark.parametrize("name", STREAMS)
def test_every_metric_conforms(name):
    check_drop_metric(family("dropping").load(name))


def test_cosine_importance_of_known_angles():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    assert cosine(before, after).tolist() == pytest.approx([0.0, 1.0, 2.0, 1 - math.sqrt(0.5)], abs=1e-6)


def test_cosine_keeps_digits_near_one():
    """A rotation by 1e-3 has importance 5e-7; 1 - cos in float32 would give a multiple of 6e-8."""
    angle = 1e-3
    got = cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]]))
    assert float(got) == pytest.approx(angle**2 / 2, rel=1e-3)


def test_bf16_input_is_accumulated_in_float32():
    before = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = (before.float() * 1.0078125).bfloat16()
    assert cosine(before, after).dtype == torch.float32


def test_lowest_breaks_ties_by_index():
    assert lowest([0.3, 0.1, 0.1, 0.2], 2) == (1, 2)
    assert lowest([0.1, 0.1, 0.1], 1, without=(0,)) == (1,)


def test_blocks_come_first_and_are_not_chosen_twice():
    plan = choose_drops(
        [0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.05, 0.4, 0.5],
        counts={"block": 1, "attention": 1, "mlp": 1}, metric="cosine", profile="zero",
    )  # fmt: skip
    assert (plan.block, plan.attention, plan.mlp) == ((0,), (1,), (1,))
    assert plan.dropped_attention() == (0, 1)
    assert plan.to_json()["attention"] == [1]


def test_too_many_drops_are_refused_with_the_limit():
    with pytest.raises(ConfigError, match=r"--attention 3: the model has 3 layers, of which 1 go.*at most 2"):
        choose_drops(
            [1.0] * 3, [1.0] * 3, [1.0] * 3, counts={"block": 1, "attention": 3, "mlp": 0}, metric="c", profile="z"
        )


def test_cache_bytes_of_llama_3_70b():
    """2 x 8 x 128 x 2 bytes x 80 layers = 327,680 bytes a token, half of it with 40 attentions."""
    shape = cache_shape(
        {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
    )
    assert kv_bytes_per_token(shape, 80, 2) == 327_680
    assert kv_bytes_per_token(shape, 40, 2) == 163_840


LLAMA = {"model.embed_tokens.weight": (10, 4), "model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,)}


def test_an_embedding_counts_only_as_the_tied_head():
    assert matrix_parameters(LLAMA, embedding="embed_tokens", tied=True) == 40 + 24
    assert matrix_parameters(LLAMA | {"lm_head.weight": (10, 4)}, embedding="embed_tokens", tied=False) == 24 + 40


def test_learned_positions_are_looked_up():
    gpt2 = {"wte.weight": (10, 4), "wpe.weight": (8, 4), "h.0.attn.c_proj.weight": (4, 4), "h.0.attn.c_proj.bias": (4,)}
    assert matrix_parameters(gpt2, embedding="wte", tied=True) == 40 + 16


@pytest.mark.parametrize(
    "experts",
    [
        {f"model.layers.0.mlp.experts.{e}.down_proj.weight": (4, 6) for e in range(8)},
        {"model.layers.0.mlp.experts.down_proj": (8, 4, 6)},
    ],
    ids=["separate", "fused"],
)
def test_a_token_uses_only_its_experts(experts):
    shapes = experts | {"model.layers.0.mlp.gate.weight": (8, 4)}
    assert matrix_parameters(shapes, embedding="embed_tokens", tied=False, experts=8, active=2) == 2 * 24 + 32
