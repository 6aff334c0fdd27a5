"""Fisher diagonals and Gram matrices: what autograd and plain sums give on the model that transformers loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.load import load_model
from honeloom.backends.hf.measure import (
    MeasuredModel,
    fisher_diagonals,
    gram_bytes,
    gram_matrices,
    shared_inputs,
)
from honeloom.errors import CheckpointError, ConfigError, NotFiniteError
from honeloom.merging.engine.sources import ModelSource

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {**SMALL, "attention_bias": True},
    "qwen3": {**SMALL, "head_dim": 16},
    "gemma2": {**SMALL, "head_dim": 16},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.2},
    "mixtral": {**SMALL, "num_local_experts": 4},
}  # fmt: skip


def row(ids, targets):
    """Token ids of which the last so many are targets."""
    scored = (False,) * (len(ids) - targets) + (True,) * targets
    return Encoded(tuple(ids), scored, chars=0, truncated=False, ends=False)


ROWS = [row([1, 5, 9, 30, 2, 7], 3), row([3, 3, 8, 60, 1], 4), row([1, 17, 40], 1)]


def write(folder, family, **extra):
    config = CONFIG_MAPPING[family](**FAMILIES[family] | extra)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def opened(folder, base=None, *, untied=False):
    with ModelSource("m", folder, base) as source:
        if untied:
            source.untie()
        return MeasuredModel.load(source, device=CPU, dtype=torch.float32)


def grams_of(measured, rows=ROWS, budget=1 << 40):
    """Every layer's matrix by the name of its weight."""
    firsts = shared_inputs(measured, rows[0])
    found = {}
    for part in gram_matrices(measured, rows, firsts, budget=budget):
        found |= part
    return {name: found[first] for name, first in firsts.items()}


def log_likelihood(model, item):
    """Sum over targets, one token after the other."""
    logits = model(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(dim=-1)
    return sum(logits[t - 1, item.ids[t]] for t in range(1, len(item.ids)) if item.scored[t])


def squared_gradients(model, rows=ROWS):
    """Mean over rows of squared gradients, by parameter."""
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    totals = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    for item in rows:
        gradients = torch.autograd.grad(log_likelihood(model, item), list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            totals[name] += 0 if gradient is None else gradient.double() ** 2
    return {n: (t / len(rows)).float() for n, t in totals.items()}


def on_disk(values, family):
    """Of GPT-NeoX alone the head has another name in files."""
    return {n.replace("lm_head", "embed_out") if family == "gpt_neox" else n: v for n, v in values.items()}


def require_close(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        scale = float(tensor.max())
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "gpt2"])
def test_fisher_is_the_mean_squared_gradient_of_each_row(tmp_path, family, tied):
    folder = write(tmp_path / "m", family, tie_word_embeddings=tied)
    found = fisher_diagonals(opened(folder), ROWS)
    require_close(found, on_disk(squared_gradients(load_model(folder)), family))
    assert set(found) == set(load_file(folder / "model.safetensors"))
    assert all(t.dtype == torch.float32 for t in found.values())


def test_fisher_of_the_head_by_hand(tmp_path):
    """The gradient of log p with respect to the head is the sum over targets of (one-hot - p) times the state."""
    folder = write(tmp_path / "m", "llama", tie_word_embeddings=False)
    model = load_model(folder)
    wanted = torch.zeros(64, 32, dtype=torch.float64)
    for item in ROWS:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([item.ids]), output_hidden_states=True)
        gradient = torch.zeros_like(wanted)
        for t in range(1, len(item.ids)):
            if item.scored[t]:
                error = -out.logits[0, t - 1].double().softmax(dim=0)
                error[item.ids[t]] += 1
                gradient += torch.outer(error, out.hidden_states[-1][0, t - 1].double())
        wanted += gradient**2 / len(ROWS)
    found = fisher_diagonals(opened(folder), ROWS)["lm_head.weight"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))


def test_a_tied_head_counts_with_the_embeddings_unless_it_gets_a_name(tmp_path):
    folder = write(tmp_path / "m", "llama", tie_word_embeddings=True)
    together = fisher_diagonals(opened(folder), ROWS)["model.embed_tokens.weight"]
    apart = fisher_diagonals(opened(folder, untied=True), ROWS)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(apart)
    unseen = [i for i in range(64) if all(i not in item.ids for item in ROWS)]
    assert float(apart["model.embed_tokens.weight"][unseen].abs().max()) == 0, "a token that no row has"
    assert torch.allclose(together[unseen], apart["lm_head.weight"][unseen], rtol=1e-4, atol=1e-9)
    total = apart["model.embed_tokens.weight"] + apart["lm_head.weight"]
    assert not torch.allclose(together, total, rtol=0.01), "the square of a sum is no sum of squares"


def test_fisher_of_experts_has_their_names_on_disk(tmp_path):
    folder = write(tmp_path / "m", "mixtral")
    found = fisher_diagonals(opened(folder), ROWS)
    assert set(found) == set(load_file(folder / "model.safetensors"))
    fused = squared_gradients(load_model(folder))
    joined = fused["model.layers.1.mlp.experts.gate_up_proj"]
    stem = "model.layers.1.block_sparse_moe.experts"
    for expert in range(4):
        both = torch.cat([found[f"{stem}.{expert}.{part}.weight"] for part in ("w1", "w3")])
        torch.testing.assert_close(both, joined[expert], rtol=1e-3, atol=1e-6 * float(joined.max()))


def test_an_adapter_is_measured_as_the_model_it_makes(tmp_path):
    base = write(tmp_path / "base", "llama")
    torch.manual_seed(1)
    model = get_peft_model(load_model(base), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    whole = PeftModel.from_pretrained(load_model(base), tmp_path / "adapter").merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    adapted, merged, plain = opened(tmp_path / "adapter", base), opened(tmp_path / "whole"), opened(base)
    require_close(fisher_diagonals(adapted, ROWS), fisher_diagonals(merged, ROWS))
    require_close(grams_of(adapted), grams_of(merged))
    last = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(grams_of(adapted)[last], grams_of(plain)[last], rtol=0.01)


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    measured = opened(write(tmp_path / "m", "llama"))
    before = {n: t.clone() for n, t in measured.model.state_dict().items()}
    first, _ = fisher_diagonals(measured, ROWS), grams_of(measured)
    assert all(torch.equal(before[n], t) for n, t in measured.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in measured.model.parameters())
    assert not any(m._forward_pre_hooks for m in measured.model.modules())
    again = fisher_diagonals(measured, ROWS)
    assert all(torch.equal(first[n], t) for n, t in again.items()), "the same bits, not twice the sum"


def test_one_thread_computes_however_many_there_are(tmp_path):
    measured = opened(write(tmp_path / "m", "llama"))
    fisher, grams = fisher_diagonals(measured, ROWS), grams_of(measured)
    used = set()
    measured.model.register_forward_hook(lambda *_: used.add(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(fisher[n], t) for n, t in fisher_diagonals(measured, ROWS).items())
        assert all(torch.equal(grams[n], t) for n, t in grams_of(measured).items())
        assert (used, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [[], [ROWS[0], row([1, 2, 3], 0)]], ids=["none", "without a target"])
def test_fisher_needs_targets(tmp_path, rows):
    with pytest.raises(ValueError, match="every row needs a target"):
        fisher_diagonals(opened(write(tmp_path / "m", "llama")), rows)


def plain_inputs(model, rows=ROWS):
    """What every linear layer gets over all tokens, (n, in) float64, by module path."""
    seen = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(
            lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for item in rows:
            model(input_ids=torch.tensor([item.ids]))
    return {name: torch.cat(inputs).double() for name, inputs in seen.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_gram_is_the_mean_outer_product_of_inputs(tmp_path, family):
    folder = write(tmp_path / "m", family, tie_word_embeddings=False)
    found = grams_of(opened(folder))
    inputs = on_disk({f"{n}.weight": x for n, x in plain_inputs(load_model(folder)).items()}, family)
    assert set(found) == set(inputs)
    for name, x in inputs.items():
        assert len(x) == sum(len(item.ids) for item in ROWS), "prompts count too"
        wanted, gram = (x.T @ x / len(x)).float(), found[name]
        torch.testing.assert_close(gram, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))
        assert torch.equal(gram, gram.T)


def test_layers_with_one_input_share_a_matrix(tmp_path):
    measured = opened(write(tmp_path / "m", "llama", tie_word_embeddings=False))
    firsts = shared_inputs(measured, ROWS[0])
    stem = "model.layers.1"
    attention = {firsts[f"{stem}.self_attn.{p}_proj.weight"] for p in "qkv"}
    assert attention == {f"{stem}.self_attn.q_proj.weight"}
    assert firsts[f"{stem}.mlp.up_proj.weight"] == f"{stem}.mlp.gate_proj.weight"
    assert firsts[f"{stem}.self_attn.o_proj.weight"] == f"{stem}.self_attn.o_proj.weight"
    assert firsts["lm_head.weight"] == "lm_head.weight"
    sizes = gram_bytes(measured, firsts)
    assert sorted(sizes.values()) == [4 * 32 * 32] * 7 + [4 * 48 * 48] * 2  # two layers of four, and the head


def test_a_tied_head_has_no_matrix_unless_it_gets_a_name(tmp_path):
    folder = write(tmp_path / "m", "llama", tie_word_embeddings=True)
    assert not [n for n in grams_of(opened(folder)) if "layers" not in n]
    assert "lm_head.weight" in grams_of(opened(folder, untied=True))


@settings(max_examples=12, deadline=None)
@given(budget=st.integers(0, 60_000))
def test_passes_change_no_bit_and_keep_to_the_budget(llama, budget):
    firsts = shared_inputs(llama, ROWS[0])
    sizes = gram_bytes(llama, firsts)
    parts = list(gram_matrices(llama, ROWS, firsts, budget=budget))
    assert [name for part in parts for name in part] == list(sizes)
    for part in parts:
        assert len(part) == 1 or sum(sizes[name] for name in part) <= budget
    (whole,) = gram_matrices(llama, ROWS, firsts, budget=sum(sizes.values()))
    assert all(torch.equal(whole[n], t) for part in parts for n, t in part.items())


ids = st.lists(st.integers(0, 63), min_size=2, max_size=12)


@settings(max_examples=12, deadline=None)
@given(first=ids, second=ids)
def test_means_over_rows_and_tokens(llama, first, second):
    one, two = row(first, len(first) - 1), row(second, len(second) - 1)
    both, apart = grams_of(llama, [one, two]), [grams_of(llama, [item]) for item in (one, two)]
    fisher, fishers = fisher_diagonals(llama, [one, two]), [fisher_diagonals(llama, [item]) for item in (one, two)]
    n, m = len(first), len(second)
    for name, gram in both.items():
        mean = (apart[0][name] * n + apart[1][name] * m) / (n + m)
        torch.testing.assert_close(gram, mean, rtol=1e-4, atol=1e-5 * float(mean.max()))
    for name, diagonal in fisher.items():
        mean = (fishers[0][name] + fishers[1][name]) / 2
        torch.testing.assert_close(diagonal, mean, rtol=1e-4, atol=1e-6 * float(mean.max()) + 1e-12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return opened(write(tmp_path_factory.mktemp("measured") / "m", "llama", tie_word_embeddings=False))


def test_transposed_weights_are_refused(tmp_path):
    folder = write(tmp_path / "m", "gpt2")
    with pytest.raises(ConfigError, match=r"m: regmean finds no linear layer.*\(in, out\)\. Use fisher or linear"):
        shared_inputs(opened(folder), ROWS[0])


@pytest.mark.parametrize(("scale", "why"), [(1e30, r"gradients of '.*' are NaN or too large"), (3e38, "the loss")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, scale, why):
    folder = write(tmp_path / "m", "llama", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(scale)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    measured = opened(folder)
    with pytest.raises(NotFiniteError, match=f"m: {why}.*its weights are unusable"):
        fisher_diagonals(measured, ROWS)
    with pytest.raises(NotFiniteError, match=r"m: inputs of 'lm_head\.weight' are NaN or too large"):
        grams_of(measured)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = write(tmp_path / "m", "llama")
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="no place for"):
        opened(copy)
