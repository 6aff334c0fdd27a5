"""Merges in memory: the bits of the checkpoint, its losses, and gradients of the coefficients."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from live_merge_models import chat, choice, family, merged_tensors, pool_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from honeloom.backends.hf.live_merge import LiveMerge
from honeloom.backends.hf.live_weights import LiveWeights, Pool
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.score import Scorer
from honeloom.errors import ConfigError, IncompatibleModelsError, RowsError
from honeloom.merging.config import DareTiesConfig, LinearConfig, SlerpConfig, TaskArithmeticConfig, TiesConfig
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.search.candidates import Candidate, candidate_config

ROWS = [chat(i, "ab"[i % 2]) for i in range(10)]
METHODS = [LinearConfig(), TaskArithmeticConfig(scale=0.7), TiesConfig(density=0.4), DareTiesConfig()]
GROUPED = Candidate.of([[0.7, 0.3], [0.25, 0.5], [0.1, 0.4]])


@pytest.fixture
def stack():
    with ExitStack() as opened:
        yield opened


def live_tensors(live: LiveWeights) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in live.tensors()}


def require_equal(live: LiveWeights, written: dict[str, torch.Tensor]) -> None:
    held = live_tensors(live)
    assert set(written) <= set(held)
    for name, tensor in written.items():
        assert torch.equal(held[name], tensor.reshape(-1).to(held[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.type)
def test_weights_in_memory_are_those_of_the_checkpoint(tmp_path, stack, method, dtype):
    base = None if method.type == "linear" else "o"
    pool = pool_of(stack, family(tmp_path, "abo" if base else "ab", dtype=dtype), method, base=base, seed=3)
    live = LiveWeights(pool, threads=2)
    densities = (0.3, 0.9) if "density" in method.per_model else ()
    live.fill(pool.document(Candidate.of([[0.1, 0.9]])))
    for number, candidate in enumerate((Candidate.of(GROUPED.weights, densities), Candidate.of([[0.5, 0.25]]))):
        document = pool.document(candidate)
        written = merged_tensors(document, tmp_path / f"out{number}")
        assert next(iter(written.values())).dtype == dtype
        live.fill(document)
        require_equal(live, written)
        assert next(live.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("held", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_weights_are_rounded_as_in_the_checkpoint_and_then_as_the_model_computes(
    tmp_path, stack, dtype, rounding, held
):
    pool = pool_of(
        stack, family(tmp_path, "abo", dtype=torch.bfloat16), TaskArithmeticConfig(), base="o",
        dtype=dtype, rounding=rounding, seed=3,
    )  # fmt: skip
    live = LiveWeights(pool, loading=Loading(dtype=held), threads=1)
    document = pool.document(GROUPED)
    live.fill(document)
    require_equal(live, merged_tensors(document, tmp_path / "out"))


def test_cuts_of_task_vectors_are_found_once(tmp_path, stack, monkeypatch):
    pool = pool_of(stack, family(tmp_path, "abo"), TiesConfig(density=0.3), base="o")
    live = LiveWeights(pool, threads=1)
    live.fill(pool.document(GROUPED))
    with monkeypatch.context() as broken:
        broken.setattr("honeloom.merging.engine.select._first_pass", lambda *_: 1 / 0)
        live.fill(pool.document(Candidate.of([[0.5, 0.2]])))
        with pytest.raises(ZeroDivisionError):
            live.fill(pool.document(Candidate.of([[0.5, 0.2]], (0.6, 0.3))))
    document = pool.document(Candidate.of([[0.5, 0.2]]))
    live.fill(document)
    require_equal(live, merged_tensors(document, tmp_path / "out"))


@pytest.mark.parametrize("untied", ["", "b", "ab"])
def test_heads_are_tied_as_in_the_checkpoint(tmp_path, stack, untied):
    pool = pool_of(stack, family(tmp_path, "ab", untied=untied), LinearConfig())
    live = LiveWeights(pool)
    document = pool.document(Candidate.of([[0.5, 0.5]]))
    live.fill(document)
    written = merged_tensors(document, tmp_path / "out")
    require_equal(live, written)
    assert ("lm_head.weight" in written) == bool(untied)
    head, embeddings = live.model.lm_head.weight, live.model.model.embed_tokens.weight
    assert (head.data_ptr() == embeddings.data_ptr()) == (not untied)


def test_only_tensors_that_change_are_merged_again(tmp_path, stack):
    pool = pool_of(stack, family(tmp_path, "ab"), LinearConfig())
    live = LiveWeights(pool)
    live.fill(pool.document(GROUPED))
    everything = live.merged
    live.fill(pool.document(GROUPED))
    assert live.merged == 0
    other = Candidate.of([[0.7, 0.3], [0.9, 0.1], [0.1, 0.4]])
    live.fill(pool.document(other))
    held = live_tensors(live)
    # Three layers in two groups: layer 2 is the second.
    assert 0 < live.merged < everything
    assert live.merged == sum(".layers.2." in name for name in held)
    fresh = LiveWeights(pool)
    fresh.fill(pool.document(other))
    assert all(torch.equal(held[name], values) for name, values in fresh.tensors())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_merge_after_merge_opens_no_further_files(tmp_path, stack, monkeypatch):
    monkeypatch.setattr("honeloom.backends.hf.live_weights._HEAP", 1)  # a task per tensor, so that all threads work
    pool = pool_of(stack, family(tmp_path, "abo"), TaskArithmeticConfig(), base="o")
    live = LiveWeights(pool, threads=2)
    counts = []
    for number in range(12):
        live.fill(pool.document(Candidate.of([[0.1 * number, 0.5]])))
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(counts[6:]) <= max(counts[:6])


def test_an_adapter_is_merged_as_in_the_checkpoint(tmp_path, stack):
    folders = family(tmp_path, "ab")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folders["b"]),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    name = f"{folders['b']}+{tmp_path / 'adapter'}"
    sources = {
        str(folders["a"]): stack.enter_context(ModelSource(str(folders["a"]), folders["a"])),
        name: stack.enter_context(ModelSource(name, tmp_path / "adapter", folders["b"])),
    }
    live = LiveWeights(Pool(list(sources), sources, None, LinearConfig(), {}))
    document = live.pool.document(GROUPED)
    live.fill(document)
    require_equal(live, merged_tensors(document, tmp_path / "out"))


def test_a_failed_merge_leaves_nothing_that_counts_as_held(tmp_path, stack, monkeypatch):
    pool = pool_of(stack, family(tmp_path, "ab"), LinearConfig())
    live = LiveWeights(pool, threads=1)
    live.fill(pool.document(GROUPED))
    with monkeypatch.context() as broken:
        broken.setattr("honeloom.merging.engine.streaming.prepared_chunk", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            live.fill(pool.document(Candidate.of([[0.5, 0.5]])))
    live.fill(pool.document(GROUPED))
    fresh = LiveWeights(pool)
    fresh.fill(pool.document(GROUPED))
    held = live_tensors(live)
    assert all(torch.equal(held[name], values) for name, values in fresh.tensors())


def test_measured_values_are_those_of_the_written_model(tmp_path, stack):
    pool = pool_of(stack, family(tmp_path, "ab"), LinearConfig())
    rows = [*ROWS, *(choice(i) for i in range(5))]
    live = LiveMerge(pool, rows, batch_size=4, groups=2)
    values = live.measure(GROUPED, range(len(rows)))
    merged_tensors(pool.document(GROUPED), tmp_path / "out")
    scorer = Scorer.open(tmp_path / "out", batch_size=4)
    losses = [(v.loss_sum / math.log(2), v.chars) for _, v in scorer.losses(ROWS)]
    losses += [(v.losses[r.answer] / math.log(2), v.chars[r.answer]) for r, v in scorer.choices(rows[10:])]
    assert values == pytest.approx(np.array(losses), rel=1e-12)
    assert live.measure(GROUPED, [3, 1]) == pytest.approx(values[[3, 1]], rel=1e-5)
    nats = LiveMerge(pool, ROWS, batch_size=4, metric="loss", groups=2)
    tokens = [(v.loss_sum, v.tokens) for _, v in scorer.losses(ROWS)]
    assert nats.measure(GROUPED, range(10)) == pytest.approx(np.array(tokens), rel=1e-12)


def test_accuracy_counts_wrong_choices(tmp_path, stack):
    pool = pool_of(stack, family(tmp_path, "ab"), LinearConfig())
    rows = [choice(i) for i in range(9)]
    live = LiveMerge(pool, rows, metric="accuracy")
    merged_tensors(pool.document(Candidate.of([[0.5, 0.5]])), tmp_path / "out")
    scored = Scorer.open(tmp_path / "out").choices(rows)
    wrong = [float(v.best(per_char=False) != r.answer) for r, v in scored]
    assert 0 < sum(wrong) < 9
    assert live.measure(Candidate.of([[0.5, 0.5]]), range(9)).tolist() == [[w, 1.0] for w in wrong]
    with pytest.raises(ConfigError, match=r"rows:0: a chat row has no choices"):
        LiveMerge(pool, ROWS, metric="accuracy")
    with pytest.raises(ConfigError, match="accuracy has no gradient"):
        live.gradient(Candidate.of([[0.5, 0.5]]), [0], np.ones(1))


def test_a_single_model_is_measured_as_it_is_under_a_method_that_trims(tmp_path, stack):
    folders = family(tmp_path, "abo")
    live = LiveMerge(pool_of(stack, folders, TiesConfig(density=0.1), base="o"), ROWS, batch_size=4)
    values = live.single(1, range(10))
    require_equal(live.weights, load_file(folders["b"] / "model.safetensors"))
    alone = [(v.loss_sum / math.log(2), v.chars) for _, v in Scorer.open(folders["b"], batch_size=4).losses(ROWS)]
    assert values == pytest.approx(np.array(alone), rel=1e-12)
    assert not np.allclose(live.measure(Candidate.single(1, 2, 1), range(10)), values)


@pytest.mark.parametrize(
    "method",
    [LinearConfig(), LinearConfig(normalize=False), TaskArithmeticConfig(scale=0.8),
     TaskArithmeticConfig(scale=0.8, normalize=True)],
    ids=["linear", "linear-sum", "task", "task-mean"],
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(tmp_path, stack, method):
    base = "o" if method.type == "task_arithmetic" else None
    pool = pool_of(stack, family(tmp_path, "abo" if base else "ab"), method, base=base)
    live = LiveMerge(pool, ROWS, groups=3, batch_size=4)
    table = np.array([[0.6, 0.5], [0.4, 0.7], [0.5, 0.5], [0.3, 0.8]])
    factors, rows = np.linspace(0.2, 1.0, 7), [9, 0, 3, 4, 5, 7, 8]
    values, slope = live.gradient(Candidate.of(table), rows, factors)
    assert values == pytest.approx(live.measure(Candidate.of(table), rows), rel=1e-5)
    assert slope.shape == (4, 2)
    for place in np.ndindex(4, 2):
        ends = []
        for step in (-0.004, 0.004):
            moved = table.copy()
            moved[place] += step
            ends.append(float(factors @ live.measure(Candidate.of(moved), rows)[:, 0]))
        assert (ends[1] - ends[0]) / 0.008 == pytest.approx(slope[place], rel=0.02, abs=0.02 * np.abs(slope).max()), (
            place
        )
    assert all(p.grad is None for p in live.weights.model.parameters())


def test_gradients_reach_models_without_a_weight(tmp_path, stack):
    pool = pool_of(stack, family(tmp_path, "abo"), TaskArithmeticConfig(), base="o")
    live = LiveMerge(pool, ROWS)
    _, slope = live.gradient(Candidate.of([[0.5, 0.0]]), range(10), np.ones(10))
    ends = [live.measure(Candidate.of([[0.5, w]]), range(10))[:, 0].sum() for w in (-0.01, 0.01)]
    assert slope[0, 1] == pytest.approx((ends[1] - ends[0]) / 0.02, rel=0.02)


def test_gradients_of_other_methods_are_refused(tmp_path, stack):
    live = LiveMerge(pool_of(stack, family(tmp_path, "abo"), TiesConfig(), base="o"), ROWS)
    with pytest.raises(ConfigError, match=r"ties is not differentiated.*search method cma"):
        live.gradient(Candidate.of([[0.5, 0.5]]), [0], np.ones(1))

    varying = TaskArithmeticConfig(scale=[0.5, 1.0])
    live = LiveMerge(pool_of(stack, family(tmp_path, "abo"), varying, base="o"), ROWS)
    with pytest.raises(ConfigError, match="scale varies over tensors"):
        live.gradient(Candidate.of([[0.5, 0.5]]), [0], np.ones(1))


def test_the_chosen_template_is_used(tmp_path, stack):
    folders = family(tmp_path, "ab")
    (folders["a"] / "chat_template.jinja").unlink(missing_ok=True)
    file = folders["a"] / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))
    plain = LiveMerge(pool_of(stack, folders, LinearConfig(), chat_template="auto"), ROWS, metric="loss")
    given = LiveMerge(pool_of(stack, folders, LinearConfig(), chat_template=str(folders["b"])), ROWS, metric="loss")
    own = Scorer.open(folders["b"])
    candidate = Candidate.of([[0.0, 1.0]])
    expected = np.array([(v.loss_sum, v.tokens) for _, v in own.losses(ROWS)])
    assert given.measure(candidate, range(10)) == pytest.approx(expected, rel=1e-6)
    assert not np.allclose(plain.measure(candidate, range(10))[:, 0], expected[:, 0])


def test_rows_that_cannot_be_scored_are_left_out(tmp_path, stack):
    pool = pool_of(stack, family(tmp_path, "ab"), LinearConfig())
    long = chat(1)
    live = LiveMerge(pool, [long, chat(0)], max_length=12)
    assert [row.id for row in live.rows] + [row.id for row, _ in live.left_out] in (["r0", "r1"], ["r1", "r0"])
    with pytest.raises(RowsError, match=r"none of the 1 rows can be scored; first rows:1: no scored token"):
        LiveMerge(pool, [long], max_length=2)


def test_what_cannot_be_searched_is_refused(tmp_path, stack):
    folders = family(tmp_path, "ab")
    pool = pool_of(stack, folders, LinearConfig())
    with pytest.raises(ConfigError, match="4 groups of layers, and the models have 3 layers"):
        LiveMerge(pool, ROWS, groups=4)
    with pytest.raises(ConfigError, match="load_in 4bit"):
        LiveMerge(pool, ROWS, loading=Loading(load_in="4bit"))
    config = json.loads((folders["b"] / "config.json").read_text())
    (folders["b"] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with ExitStack() as again, pytest.raises(IncompatibleModelsError, match="rms_norm_eps"):
        LiveWeights(pool_of(again, folders, LinearConfig()))
    settings = {"layers": 2, "prefix": "model.layers"}
    with pytest.raises(ConfigError, match="slerp does not look at weights"):
        candidate_config(Candidate.of([[0.5, 0.5]]), ["a", "b"], None, SlerpConfig(), **settings)
    with pytest.raises(ConfigError, match="linear has no density"):
        candidate_config(Candidate.of([[0.5, 0.5]], (0.5, 0.5)), ["a", "b"], None, LinearConfig(), **settings)


def test_other_layouts_are_filled(tmp_path, stack):
    """GPT-2 names on disk, and the experts of a Mixtral, which are one tensor in memory."""
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    made = {
        "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)),
        "mixtral": (
            MixtralForCausalLM,
            MixtralConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=64, num_local_experts=3, num_experts_per_tok=2,
            ),
        ),
    }  # fmt: skip
    for name, (kind, config) in made.items():
        folders: dict[str, Path] = {}
        for seed in range(2):
            torch.manual_seed(seed)
            folders[str(seed)] = tmp_path / f"{name}{seed}"
            kind(config).save_pretrained(folders[str(seed)])
        pool = pool_of(stack, folders, LinearConfig())
        live = LiveWeights(pool)
        document = pool.document(Candidate.of([[0.3, 0.7], [0.8, 0.2], [0.5, 0.5]]))
        live.fill(document)
        written = merged_tensors(document, tmp_path / f"{name}-out")
        require_equal(live, written)
        ids = torch.arange(10).reshape(1, 10)
        loaded = kind.from_pretrained(tmp_path / f"{name}-out").eval()
        with torch.no_grad():
            assert torch.equal(live.model(ids).logits, loaded(ids).logits)
