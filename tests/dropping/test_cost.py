"""Costs against hand-worked numbers."""

import pytest

from honeloom.dropping.cost import (
    CacheLayer,
    Cost,
    Prices,
    cache_layers,
    decode_speedup,
    expert_counts,
    matrix_parameters,
)
from honeloom.dropping.scores import Unit

LLAMA_70B = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
LLAMA = {"model.embed_tokens.weight": (10, 4), "model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,)}


def prices(config, itemsize=2, **fields):
    given = {"embedding": "embed_tokens", "tied": False, "experts": 1, "active": 1, **fields}
    return Prices(cache=cache_layers(config), itemsize=itemsize, **given)


def test_cache_bytes_of_llama_3_70b():
    """2 x 8 x 128 x 2 bytes x 80 layers = 327,680 bytes a token, half of it with 40 attentions."""
    found = prices(LLAMA_70B)
    assert found.cost({}, range(80)).kv_bytes_per_token == 327_680
    assert found.cost({}, range(40)).kv_bytes_per_token == 163_840
    assert found.cache_bytes(range(40), 4096, batch=3) == 163_840 * 4096 * 3


def test_sliding_layers_keep_no_more_than_their_window():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32, "num_key_value_heads": 2}
    found = prices({**config, "sliding_window": 100, "layer_types": kinds}, itemsize=4)
    assert [c.window for c in found.cache] == [100, None, 100, None]
    token = 2 * 2 * 8 * 4
    assert found.cost({}, range(4)).kv_bytes_per_token == 4 * token
    assert found.cache_bytes(range(4), 50) == 4 * 50 * token
    assert found.cache_bytes(range(4), 1000) == (2 * 100 + 2 * 1000) * token
    assert found.cache_bytes([1, 3], 1000) == 2 * 1000 * token
    assert cache_layers({**config, "sliding_window": 9, "use_sliding_window": False})[0] == CacheLayer(32)
    assert cache_layers({**config, "sliding_window": 9})[0] == CacheLayer(32, 9)


def test_caches_of_other_shapes():
    assert cache_layers({"n_layer": 2, "n_head": 4, "n_embd": 32})[0].elements == 2 * 4 * 8
    falcon = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "multi_query": True}
    assert cache_layers(falcon)[0].elements == 2 * 8
    latent = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "kv_lora_rank": 16,
              "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}  # fmt: skip
    assert cache_layers(latent)[0].elements == 4 * (8 + 4 + 6)
    hybrid = {**LLAMA_70B, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    assert [c.elements for c in cache_layers(hybrid)] == [0, 2048]
    assert cache_layers({"text_config": LLAMA_70B})[0].elements == 2048


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
    shapes = experts | {"model.layers.0.mlp.gate.weight": (8, 4), "model.layers.0.mlp.shared_expert.up.weight": (5, 4)}
    found = matrix_parameters(shapes, embedding="embed_tokens", tied=False, experts=8, active=2)
    assert found == 2 * 24 + 32 + 20


def test_counts_of_experts_under_their_names():
    assert expert_counts({"num_local_experts": 8, "num_experts_per_tok": 2}) == (8, 2)
    assert expert_counts({"n_routed_experts": 64, "num_experts_per_tok": 6}) == (64, 6)
    assert expert_counts({"hidden_size": 4}) == (1, 1)


def test_units_cost_what_llm_drop_saves():
    """Llama-3-8B: an attention has 41.95 M parameters with its norm, an MLP 176.2 M."""
    d, kv, f = 4096, 1024, 14336
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (d, d), "model.layers.0.self_attn.k_proj.weight": (kv, d),
        "model.layers.0.self_attn.v_proj.weight": (kv, d), "model.layers.0.self_attn.o_proj.weight": (d, d),
        "model.layers.0.input_layernorm.weight": (d,), "model.layers.0.post_attention_layernorm.weight": (d,),
        "model.layers.0.mlp.gate_proj.weight": (f, d), "model.layers.0.mlp.up_proj.weight": (f, d),
        "model.layers.0.mlp.down_proj.weight": (d, f), "model.norm.weight": (d,),
    }  # fmt: skip

    def half_of(name):
        if not name.startswith("model.layers."):
            return None
        return 0, "mlp" if "mlp" in name or "post" in name else "attention"

    config = {"num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": d}
    found = prices(config).units(shapes, half_of)
    attention, mlp = 2 * d * (d + kv), 3 * d * f
    assert found[Unit("attention", 0)] == Cost(attention + d, 4096, 2 * attention)
    assert found[Unit("mlp", 0)] == Cost(mlp + d, 0, 2 * mlp)
    assert found[Unit("block", 0)] == found[Unit("attention", 0)] + found[Unit("mlp", 0)]
    assert round(found[Unit("attention", 0)].params / 1e6, 2) == 41.95
    assert round(found[Unit("mlp", 0)].params / 1e6, 1) == 176.2


@pytest.mark.parametrize(
    ("batch", "context", "small", "large"),
    [(1, 0, 1.10, 1.10), (1, 8192, 1.13, 1.10), (1, 32768, 1.22, 1.13), (32, 8192, 1.60, 1.32)],
)
def test_the_bound_of_decoding_with_half_of_the_attentions(batch, context, small, large):
    """Llama-3-8B and 70B in 16 bits: MB of a layer's attention, of its MLP, and of the head."""
    for layers, attention, mlp, head, expected in (
        (32, 83.9e6, 352.3e6, 1.05e9, small), (80, 302e6, 1409e6, 2.1e9, large),
    ):  # fmt: skip
        cache = batch * 4096 * context
        before = (layers * (attention + mlp) + head, layers * cache)
        after = (layers * mlp + layers / 2 * attention + head, layers / 2 * cache)
        assert decode_speedup(before, after) == pytest.approx(expected, abs=0.006)
