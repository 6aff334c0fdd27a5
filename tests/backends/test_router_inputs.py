"""What gates receive, against hidden states that transformers gives; and gates that are held, counted and trained."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from honeloom.backends.hf import router_inputs
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.mixture_use import expert_shares, held_to, pad_rows, weigh_all
from honeloom.backends.hf.router_inputs import Place, Span, received, row_losses
from honeloom.backends.hf.router_tuning import gate_names, tune_by_losses, tune_gates
from honeloom.checkpoint.architectures import architecture_of
from honeloom.errors import CheckpointError, NotFiniteError

ROWS = ((3, 4, 5, 6, 7, 8, 9), (10, 11, 12), (13, 14, 15, 16, 17))


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "vocab_size": 40, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.3)).eval()


def gather(model, places, spans):
    found = {}
    received(
        model, architecture_of(model.config.to_dict()), places, spans,
        lambda place, span, vectors: found.update({(place, span): vectors.clone()}),
    )  # fmt: skip
    return found


@torch.inference_mode()
def states(model, ids):
    """Streams before each layer, and what each MLP gets."""
    seen = []
    handles = [layer.mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0][0])) for layer in model.model.layers]
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return [h[0] for h in output.hidden_states], seen


@pytest.mark.parametrize("tokens", [4096, 8])
def test_places_and_pooling(model, monkeypatch, tokens):
    """Whatever the batches: the mean, the last and some tokens of what MLPs, layers and later layers get."""
    monkeypatch.setattr(router_inputs, "BATCH_TOKENS", tokens)
    places = [Place(0, "mlp"), Place(1, "mlp")]
    spans = [Span(ROWS[0]), Span(ROWS[1], "last"), Span(ROWS[2], "spread", 3)]
    found = gather(model, places, spans)
    for layer in (0, 1):
        mlps = [states(model, ids)[1][layer] for ids in ROWS]
        torch.testing.assert_close(found[layer, 0], mlps[0].mean(dim=0, keepdim=True), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[layer, 1], mlps[1][-1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[layer, 2], mlps[2][[0, 2, 4]], atol=1e-5, rtol=1e-5)
    streams = states(model, ROWS[0])[0]
    found = gather(model, [Place(-1, "output"), Place(1, "layer"), Place(0, "output")], spans[:1])
    for index, stream in ((0, streams[0]), (1, streams[1]), (2, streams[1])):
        torch.testing.assert_close(found[index, 0], stream.mean(dim=0, keepdim=True), atol=1e-5, rtol=1e-5)


def test_nothing_is_computed_beyond_the_last_place(model):
    def fail(*args):
        raise AssertionError("the head is not needed")

    model.lm_head.register_forward_pre_hook(fail)
    model.model.layers[1].mlp.register_forward_hook(fail)
    assert len(gather(model, [Place(0, "mlp"), Place(1, "mlp")], [Span(r) for r in ROWS])) == 6


def test_damaged_weights_are_told(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match="layer 0 receives"):
        gather(model, [Place(0, "mlp")], [Span(ROWS[0])])


def test_losses_are_those_of_the_scored_tokens(model):
    row = Encoded(ROWS[0], (False, False, True, True, False, True, True), 4, False, False)
    with torch.inference_mode():
        chances = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(dim=-1)
    wanted = -sum(float(chances[i - 1, row.ids[i]]) for i in (2, 3, 5, 6))
    assert float(row_losses(model, [row])[0]) == pytest.approx(wanted, rel=1e-6)


def test_a_held_gate_gives_one_expert_all_the_weight(mixture):
    rows = [r[:5] for r in ROWS]
    for expert in range(3):
        with held_to(mixture, expert):
            shares = expert_shares(mixture, 3, rows, [5] * 3)
            ids, mask = pad_rows(rows)
            one = mixture(input_ids=ids, attention_mask=mask).logits
        assert shares[:, expert].tolist() == [1.0] * 3
        with torch.no_grad():  # the same by hand: all experts are this one
            kept = [
                (m.gate_up_proj.clone(), m.down_proj.clone())
                for m in (layer.mlp.experts for layer in mixture.model.layers)
            ]
            for layer in mixture.model.layers:
                for weights in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                    weights.copy_(weights[expert].expand_as(weights).clone())
            other = mixture(input_ids=ids, attention_mask=mask).logits
            for layer, (up, down) in zip(mixture.model.layers, kept, strict=True):
                layer.mlp.experts.gate_up_proj.copy_(up)
                layer.mlp.experts.down_proj.copy_(down)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_shares_leave_padding_out(mixture):
    together = expert_shares(mixture, 3, ROWS, [1] * 3)
    alone = torch.cat([expert_shares(mixture, 3, [row], [1]) for row in ROWS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_training_moves_the_gates_alone_also_where_one_expert_works(mixture):
    for layer in mixture.model.layers:
        layer.mlp.gate.top_k = 1
    before = {n: p.detach().clone() for n, p in mixture.named_parameters()}
    rows = [Encoded(row, (False, *[True] * (len(row) - 1)), 1, False, False) for row in ROWS]
    losses = tune_gates(
        mixture, rows, steps=30, batch_size=3, lr=0.05, seed=0, all_experts=lambda: weigh_all(mixture, 3), read=None
    )
    assert losses[-1] < losses[0]
    changed = {n for n, p in mixture.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(gate_names(mixture)) == {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)}


def test_a_model_without_gates_cannot_be_trained(model):
    with pytest.raises(CheckpointError, match="has no gates"):
        tune_gates(model, [], steps=1, batch_size=1, lr=1.0, seed=0, all_experts=lambda: None, read=None)


def test_a_gate_learns_who_is_best():
    """Rows on either side of a plane, each best for one expert: the expected loss goes to that of the better one."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(64, 5, generator=generator)
    side = (vectors[:, 0] > 0).long()
    losses = torch.ones(64, 2, dtype=torch.float64)
    losses[torch.arange(64), side] = 0.0
    gate = torch.nn.Linear(5, 2, bias=False)
    torch.nn.init.zeros_(gate.weight)
    told = tune_by_losses(gate, vectors, losses, steps=200, batch_size=16, lr=0.1, seed=0)
    assert told[0] == pytest.approx(0.5)
    assert sum(told[-10:]) / 10 < 0.05
    assert float((gate(vectors).argmax(dim=1) == side).float().mean()) > 0.95
