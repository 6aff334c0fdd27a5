"""Mixtures with a shared trunk: what they must equal, caches, masks, files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mixture_models import FAMILIES, force, mixture, set_gates, stock
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import honeloom
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.embed import Embedder
from honeloom.backends.hf.generate import Generator, Prompter
from honeloom.backends.hf.load import Loading, load_config, load_model, load_tokenizer
from honeloom.backends.hf.mixture_gates import Decision, RouterSpec, build_gate, pool_states
from honeloom.backends.hf.mixture_model import HoneloomMixtureConfig, HoneloomMixtureForCausalLM
from honeloom.backends.hf.score import Scorer, prompt_length
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.errors import CheckpointError
from honeloom.types.rows import Row, Turn, Where

SAMPLE = {"input": "sample"}
KINDS = {
    "ffn": ("ffn", {"top_k": 2}),
    "ffn-sample": ("ffn", {"top_k": 1, "router": SAMPLE}),
    "block": ("block", {"top_k": 1}),
    "block-2": ("block", {"top_k": 2}),
    "model": ("model", {"top_k": 1, "dense_layers": 1}),
}
every_kind = pytest.mark.parametrize(("level", "settings"), KINDS.values(), ids=KINDS)
kept_kinds = pytest.mark.parametrize(
    ("level", "settings"), [KINDS[k] for k in KINDS if k != "ffn"], ids=[k for k in KINDS if k != "ffn"]
)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def draw_ids(rows: int = 4, length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def spread(model) -> set[tuple[int, ...]]:
    """The choices that the last pass made in any layer, over rows."""
    return {tuple(row) for d in model.last_decisions.values() for row in d.experts.tolist()}


@every_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_one_model_are_that_model(family, level, settings):
    dense, ids = stock(family), draw_ids()
    made = mixture([dense] * 3, level, **settings)
    set_gates(made)
    assert far(made(ids).logits, dense(ids).logits) <= 1e-5
    assert len(spread(made)) > 1 or level == "model"


@pytest.mark.parametrize("router", [{"type": "mlp", "width": 5, "bias": True}, {"type": "subspace", "width": 3}])
@pytest.mark.parametrize("level", ["ffn", "block", "model"])
def test_copies_of_one_model_with_other_gates(level, router):
    dense, ids = stock(), draw_ids()
    made = mixture([dense, dense], level, top_k=1, router=router)
    set_gates(made)
    assert far(made(ids).logits, dense(ids).logits) <= 1e-5


@pytest.mark.parametrize("expert", [0, 1, 2])
@every_kind
def test_a_forced_router_gives_the_dense_model(level, settings, expert):
    """Models that differ in what is routed alone: with all decisions for j the mixture is model j."""
    models = [stock(seed=i) for i in range(3)]
    settings = {**settings, "router": {**settings.get("router", {}), "bias": True}}
    made = mixture(models, level, **settings)
    force(made, expert)
    dense = mixture([models[expert]], level, trunk=models[0], **{**settings, "top_k": 1, "router": {}})
    alike = stock()
    alike.load_state_dict(models[0].state_dict())
    for index in made.config.routed:
        whole = level != "ffn"
        target, source = (m.model.layers[index] for m in (alike, models[expert]))
        (target if whole else target.mlp).load_state_dict((source if whole else source.mlp).state_dict())
    ids = draw_ids()
    assert far(made(ids).logits, alike(ids).logits) <= 1e-5
    assert far(dense(ids).logits, alike(ids).logits) <= 1e-5  # k = E = 1
    assert expert == 0 or far(models[0](ids).logits, alike(ids).logits) > 1e-2


@pytest.mark.parametrize("level", ["block", "model"])
def test_rows_of_one_batch_go_to_the_expert_that_their_gate_row_points_at(level):
    """Gate row j is e_j * 1e4, and embeddings say by their coordinate j where they belong."""
    models = [stock(seed=i, num_hidden_layers=1, tie_word_embeddings=False) for i in range(2)]
    for m in models:
        m.model.embed_tokens.weight.data[:] = models[0].model.embed_tokens.weight
        m.model.embed_tokens.weight.data[:, :2] = 0
        m.model.embed_tokens.weight.data[:32, 0] = m.model.embed_tokens.weight.data[32:, 1] = 5.0
        m.model.norm.load_state_dict(models[0].model.norm.state_dict())
        m.lm_head.load_state_dict(models[0].lm_head.state_dict())
    made = mixture(models, level, top_k=1)
    gate = made.trunk.model.layers[0].gate
    gate.weight.data[0, 0] = gate.weight.data[1, 1] = 1e4
    low, high = draw_ids(2) % 29 + 3, draw_ids(2, seed=2) % 32 + 32
    ids = torch.stack([low[0], high[0], high[1], low[1]])
    logits = made(ids).logits
    assert made.last_decisions[0].experts[:, 0].tolist() == [0, 1, 1, 0]
    for row, expert in enumerate([0, 1, 1, 0]):
        assert far(logits[row], models[expert](ids[row : row + 1]).logits[0]) <= 1e-5


@every_kind
def test_all_dense_layers_are_the_trunk(level, settings):
    models, ids = [stock(seed=i) for i in range(2)], draw_ids()
    made = mixture(models, level, **{**settings, "dense_layers": 3})
    assert torch.equal(made(ids).logits, models[0](ids).logits)
    assert made.last_decisions == {}
    assert torch.equal(made.generate(ids, max_new_tokens=4), models[0].generate(ids, max_new_tokens=4))


def test_a_shared_expert_is_added():
    """Routed MLPs whose output is zero leave the shared one: the dense model of it."""
    dense, silent, ids = stock(seed=0), stock(seed=1), draw_ids()
    for layer in silent.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    made = mixture([silent, silent], "ffn", trunk=dense, shared=dense, top_k=2)
    assert far(made(ids).logits, dense(ids).logits) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@every_kind
def test_prefill_equals_cached_decode(family, level, settings):
    made = mixture([stock(family, i) for i in range(3)], level, **settings)
    set_gates(made)
    ids, prompt = draw_ids(5, 12), 4
    read = (torch.arange(12) < prompt).int().expand(5, 12)
    whole = made(ids, routing_mask=read).logits
    chosen = {i: d.experts for i, d in made.last_decisions.items()}
    assert level == "ffn" or len(spread(made)) > 1
    for cuts in ((4, 1, 1, 1, 1, 1, 1, 1, 1), (4, 5, 3), (6, 6)):
        cache, start, found = None, 0, []
        for size in cuts:
            piece = ids[:, start : start + size]
            mask = read[:, :size] if start == 0 else None
            out = made(piece, past_key_values=cache, use_cache=True, routing_mask=mask)
            cache, start = out.past_key_values, start + size
            found.append(out.logits)
            assert cache.get_seq_length() == start
        assert far(torch.cat(found, dim=1), whole) <= 2e-5
        if made.config.keeps_decisions:
            assert all(torch.equal(made.last_decisions[i].experts, chosen[i]) for i in chosen)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@kept_kinds
def test_a_left_padded_row_is_its_unpadded_run(level, settings, pooling):
    made = mixture([stock(seed=i) for i in range(3)], level, **{**settings, "router": {**SAMPLE, "pooling": pooling}})
    set_gates(made)
    ids, pad = draw_ids(3, 8), 5
    padded = torch.cat([torch.zeros(3, pad, dtype=torch.int64), ids], dim=1)
    padded[0] = draw_ids(1, 13, seed=9)[0]
    mask = torch.ones_like(padded)
    mask[1:, :pad] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    out = made(padded, attention_mask=mask, position_ids=positions, use_cache=True)
    alone = made(ids, use_cache=True)
    assert far(out.logits[1:, pad:], alone.logits[1:]) <= 2e-5
    step = torch.tensor([[7], [8], [9]])
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
    after = made(step, attention_mask=mask, position_ids=positions[:, -1:] + 1, past_key_values=out.past_key_values)
    assert far(after.logits[1:], made(step, past_key_values=alone.past_key_values).logits[1:]) <= 2e-5


@kept_kinds
def test_a_row_does_not_depend_on_its_batch(level, settings):
    made = mixture([stock(seed=i) for i in range(3)], level, **settings)
    set_gates(made)
    ids = draw_ids(6)
    together = made(ids).logits
    for row in range(6):
        assert far(made(ids[row : row + 1]).logits[0], together[row]) <= 2e-5


@every_kind
def test_beam_search_equals_the_dense_model_where_experts_are_copies(level, settings):
    dense = stock()
    made = mixture([dense] * 3, level, **settings)
    set_gates(made)
    ids, how = draw_ids(3, 6), {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "length_penalty": 0.0}
    assert torch.equal(made.generate(ids, **how), dense.generate(ids, **how))


@kept_kinds
def test_beams_take_their_experts_along(level, settings):
    """Reordering rows of a cache is the same as having read them in the new order."""
    made = mixture([stock(seed=i) for i in range(3)], level, **settings)
    set_gates(made)
    ids, order, step = draw_ids(5), torch.tensor([4, 0, 0, 2, 4]), torch.tensor([[5], [6], [7], [8], [9]])
    for move in ("reorder_cache", "batch_select_indices"):
        cache = made(ids, use_cache=True).past_key_values
        getattr(cache, move)(order)
        expected = made(ids[order], use_cache=True).past_key_values
        assert far(made(step, past_key_values=cache).logits, made(step, past_key_values=expected).logits) <= 2e-5
    cache = made(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    expected = made(ids.repeat_interleave(2, dim=0), use_cache=True).past_key_values
    step = torch.full((10, 1), 5)
    assert far(made(step, past_key_values=cache).logits, made(step, past_key_values=expected).logits) <= 2e-5
    cache.crop(-1)
    assert cache.get_seq_length() == 10
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.decisions == {}


@every_kind
def test_generation_with_a_cache_is_the_one_without(level, settings):
    """Without a cache the prompt is read anew for every token; its mask keeps the decision on the prompt."""
    made = mixture([stock(seed=i) for i in range(3)], level, **settings)
    set_gates(made)
    ids = draw_ids(4, 6)
    fast = made.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    slow = ids
    for _ in range(6):
        read = (torch.arange(slow.shape[1]) < 6).int().expand_as(slow)
        slow = torch.cat([slow, made(slow, routing_mask=read).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(fast, slow)
    assert made.generation_config.top_k != settings["top_k"]


def test_what_cannot_be_had_is_refused():
    made = mixture([stock(seed=i) for i in range(2)], "block", top_k=1)
    ids = draw_ids()
    with pytest.raises(ValueError, match=r"new_cache"):
        made(ids, past_key_values=DynamicCache(config=made.config.trunk))
    with pytest.raises(ValueError, match="row 1 has no token"):
        made(ids, routing_mask=torch.tensor([[1] * 10, [0] * 10, [1] * 10, [1] * 10]))
    with pytest.raises(ValueError, match="routing_mask is"):
        made(ids, routing_mask=torch.ones(2, 10))
    with pytest.raises(ValueError, match="attention_mask is"):
        made(ids, attention_mask=torch.ones(4, 1, 10, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match="output_hidden_states"):
        made(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        made.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(RuntimeError, match="whole model"):
        made.trunk(ids)
    with pytest.raises(CheckpointError, match="experts already"):
        HoneloomMixtureForCausalLM(
            HoneloomMixtureConfig(
                trunk={"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8, "num_local_experts": 2},
                level="block", top_k=1,
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "layer"}, "must be one of ffn, block, model"),
        ({"level": "model", "top_k": 2}, "1 at level model"),
        ({"top_k": 3}, "from 1 to 2, the number of experts"),
        ({"dense_layers": 9}, "the trunk has 3 layers"),
        ({"level": "block", "router": {"input": "token"}}, "only MLPs"),
        ({"router": {"kind": "linear"}}, "router.kind is not known"),
        ({"router": {"type": "mlp"}}, "router.width"),
    ],
)
def test_settings_that_contradict_are_refused_when_a_folder_is_opened(tmp_path, changes, message):
    document = {"model_type": "honeloom_mixture", "trunk": stock().config.to_dict(), "experts": ["a", "b"], **changes}
    (tmp_path / "config.json").write_text(json.dumps(document, default=str))
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("tie", [False, True])
@every_kind
def test_files_come_back_as_they_were(tmp_path, level, settings, tie):
    made = mixture([stock(seed=i, tie_word_embeddings=tie) for i in range(2)], level, **settings)
    set_gates(made)
    made.save_pretrained(tmp_path / "one")
    again = load_model(tmp_path / "one")
    ids = draw_ids()
    assert torch.equal(again(ids).logits, made(ids).logits)
    again.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    half = load_model(tmp_path / "one", loading=Loading(dtype="bf16"))
    kinds = {".gate." in n: p.dtype for n, p in half.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert half(ids).logits.dtype == torch.bfloat16
    (tmp_path / "two" / "generation_config.json").unlink()
    assert load_model(tmp_path / "two").generation_config.top_k != settings["top_k"]


def test_tensors_are_named_by_the_layout_of_the_format(tmp_path):
    names = {level: set(mixture([stock()] * 2, level, top_k=1, dense_layers=1).state_dict()) for level in
             ("ffn", "block", "model")}  # fmt: skip
    assert "trunk.model.layers.1.mlp.experts.1.down_proj.weight" in names["ffn"]
    assert "trunk.model.layers.2.mlp.gate.weight" in names["ffn"]
    assert "trunk.model.layers.0.mlp.down_proj.weight" in names["ffn"]
    assert "trunk.model.layers.2.experts.1.self_attn.q_proj.weight" in names["block"]
    gates = {level: sorted(n for n in found if ".gate." in n) for level, found in names.items()}
    assert gates["block"] == ["trunk.model.layers.1.gate.weight", "trunk.model.layers.2.gate.weight"]
    assert gates["model"] == ["trunk.model.layers.1.gate.weight"]


def test_files_that_do_not_fit_are_refused(tmp_path):
    made = mixture([stock(seed=i) for i in range(2)], "block", top_k=1)
    made.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"experts": ["a"]}, "config.json does not belong to these weights"),
        ({"dense_layers": 1}, r"no place for .* tensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**document, **changes}))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(document))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["trunk.model.layers.1.experts.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        load_model(tmp_path)


def test_transformers_alone_refuses_the_folder(tmp_path):
    mixture([stock()] * 2, "ffn").save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0 and "honeloom_mixture" in found.stderr


def test_decisions_are_softmax_over_all_experts_then_top_k():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    found = Decision.of_scores(scores, 2)
    assert found.experts.tolist() == [[0, 1], [2, 0]]  # of equal ones the first
    assert torch.allclose(found.weights, torch.tensor([[0.625, 0.375], [8 / 9, 1 / 9]]))
    assert {e: r.tolist() for e, r in found.groups} == {0: [0, 1], 1: [0], 2: [1]}
    parts = [torch.full((len(rows), 1), float(expert)) for expert, rows in found.groups]
    assert torch.allclose(found.combine(parts), torch.tensor([[0.375], [16 / 9]]))


def test_gates_and_pooling_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    subspace = build_gate(RouterSpec(input="sample", type="subspace", width=2), 2, 2)
    subspace.basis.data = torch.tensor([[[1.0, 0], [0, 1.0]], [[1.0, 0], [0, 0]]])
    assert subspace(x).tolist() == [[5.0, 3.0]]
    mlp = build_gate(RouterSpec(type="mlp", width=1, bias=True), 2, 2)
    mlp.up.weight.data, mlp.down.weight.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.0]])
    mlp.down.bias.data = torch.tensor([0.0, 7.0])
    silu = -1 / (1 + torch.e**1)
    assert torch.allclose(mlp(x), torch.tensor([[2 * silu, 7.0]]))
    states, mask = torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[False, True, True]])
    assert pool_states(states, mask, "mean").item() == 2.0
    assert pool_states(states, mask, "first").item() == 1.0
    states[0, 0] = torch.nan
    assert pool_states(states, mask, "mean").item() == 2.0


@pytest.fixture
def folder(tmp_path, tiny_model, other_model) -> Path:
    """A block mixture of the tiny models with their tokenizer, its decisions spread by random gates."""
    made = mixture([load_model(tiny_model), load_model(other_model)], "block", top_k=1)
    set_gates(made, scale=100.0)
    made.save_pretrained(tmp_path / "mixture")
    copy_tokenizer(tiny_model, tmp_path / "mixture")
    return tmp_path / "mixture"


def chat(question: str, answer: str, row_id: str = "r") -> Row:
    return Row(row_id, "chat", Where("rows", 1), "rows", turns=(Turn("user", question), Turn("assistant", answer)))


def test_a_scorer_decides_by_the_prompt_alone(folder):
    """Whatever the answer, its row goes where the prompt goes; and losses are those of the routed pass."""
    scorer = Scorer.open(folder, batch_size=4)
    for question in ("Say 7.", "What comes after a and b?", "9 + 9"):
        decided = []
        for answer in ("yes", "a b c d e f g", "3"):
            ((_, loss),) = scorer.losses([chat(question, answer)])
            decided.append([d.experts.tolist() for d in scorer.model.last_decisions.values()])
            assert loss.tokens > 0
        assert decided[0] == decided[1] == decided[2]
    text = Row("t", "text", Where("rows", 1), "rows", text="a b c " * 12)
    ((_, loss),) = scorer.losses([text])
    encoded = scorer.encoder.encode(text)
    ids, read = torch.tensor([encoded.ids]), torch.zeros(1, len(encoded.ids))
    read[:, :32] = 1
    logits = scorer.model(ids, routing_mask=read).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert loss.loss_sum == pytest.approx(float(expected), rel=1e-5)


def test_the_prompt_of_a_row_ends_where_the_answer_begins(folder, stories260k):
    for place in (folder, stories260k):
        encoder = Encoder(load_tokenizer(place), 128)
        turns = (Turn("user", "Hi"), Turn("assistant", "Yes"), Turn("user", "So?"), Turn("assistant", "No"))
        row = Row("r", "chat", Where("rows", 1), "rows", turns=turns)
        prompt, whole = encoder.prompt_ids(row), encoder.encode(row)
        length = prompt_length(whole, prompt, 32)
        assert len(prompt) - 1 <= length <= whole.scored.index(True)
        assert prompt == Prompter(encoder.tokenizer, 128).prompt("Hi")
        assert encoder.prompt_ids(replace(row, turns=turns[1:2])) == []
        emptied = encoder.encode(row, empty_prompt=True)
        assert 0 < prompt_length(emptied, encoder.prompt_ids(row, empty_prompt=True), 5) <= 5
        question = Row("q", "choice", Where("rows", 1), "rows", turns=turns[:1], choices=("a", "b"), answer=0)
        first = encoder.encode_choices(question)[0]
        assert list(first.ids[: first.scored.index(True)]) == encoder.prompt_ids(question)


def test_choices_of_a_mixture_are_decided_by_the_question(folder):
    scorer = Scorer.open(folder, batch_size=2)
    turns = (Turn("user", "What is 2 + 2?"),)
    row = Row("q", "choice", Where("rows", 1), "rows", turns=turns, choices=("four", "a b c d e"), answer=0)
    ((_, score),) = scorer.choices([row])
    assert all(len(set(d.experts[:, 0].tolist())) == 1 for d in scorer.model.last_decisions.values())
    alone = [next(iter(scorer.choices([replace(row, choices=(c,))])))[1].losses[0] for c in row.choices]
    assert score.losses == pytest.approx(alone, rel=1e-5)


def test_evaluate_reads_a_mixture_as_any_model(folder, tmp_path, rows):
    report = honeloom.evaluate(str(folder), rows=[str(rows)], output_dir=tmp_path / "out")
    loss = next(m for m in report.metrics if m.name == "loss" and m.domain == "all")
    assert np.isfinite(loss.value) and report.details["rows"] == 12


def test_rows_score_the_same_in_any_batch(folder):
    rows = [chat(f"Say {i}.", f"It is {i}." * (i % 3 + 1), f"r{i}") for i in range(9)]
    one, many = (dict_of(Scorer.open(folder, batch_size=size).losses(rows)) for size in (1, 5))
    assert one == pytest.approx(many, rel=1e-5)


def dict_of(scored) -> dict[str, float]:
    return {row.id: loss.loss_sum for row, loss in scored}


def test_a_generator_and_an_embedder_work_as_on_any_model(folder):
    generator = Generator.open(folder, batch_size=3)
    prompts = [f"Say {i}." for i in range(5)]
    how = {"seed": 3, "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    found = generator.generate(prompts, **how)
    generator.batch_size = 1
    assert found == generator.generate(prompts, **how)
    embedder = Embedder.open(folder, layer=1.0, loading=Loading(), batch_size=2)
    (vectors,) = embedder.embed([chat(p, "yes") for p in prompts])
    assert vectors.shape == (5, 32) and len({v.tobytes() for v in vectors}) == 5


def test_a_real_model_twice_is_that_model(stories260k, tmp_path):
    dense = load_model(stories260k)
    made = mixture([dense, dense], "block", top_k=2)
    set_gates(made)
    tokenizer = load_tokenizer(stories260k)
    text = Row("t", "text", Where("rows", 1), "rows", text="Once upon a time there was a little girl named Lily.")
    pair = [dict_of(Scorer(m, Encoder(tokenizer, 128), 4).losses([text]))["t"] for m in (made, dense)]
    assert pair[0] == pytest.approx(pair[1], rel=1e-5)


def test_one_of_two_blocks_costs_about_one_block():
    dense = stock(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    made = mixture([dense, dense], "block", top_k=1)
    set_gates(made)
    ids = draw_ids(16, 48)

    def seconds(model) -> float:
        found = []
        for _ in range(7):
            start = time.process_time()
            model(ids, use_cache=False)
            found.append(time.process_time() - start)
        return min(found)

    seconds(made)
    assert seconds(made) < 1.5 * seconds(dense)
