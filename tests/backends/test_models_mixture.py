"""Mixtures of whole models: ids where they share a vocabulary, text where each has its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mixture_models import models_mixture, set_gates, stock, write_models
from transformers import DynamicCache

import honeloom
from honeloom.backends.hf.embed import Embedder
from honeloom.backends.hf.generate import Generator
from honeloom.backends.hf.load import Loading, load_config, load_model
from honeloom.backends.hf.routed import RoutedGenerator, RoutedScorer
from honeloom.backends.hf.score import Scorer
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.errors import CheckpointError, ConfigError, SourceError
from honeloom.stages.inputs import model_files, resolve_model
from honeloom.types.rows import Row, Turn, Where

HERE = Where("rows", 1)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def draw_ids(rows: int = 5, length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def unlike() -> list:
    """Three models of other families and shapes, with one vocabulary."""
    return [stock("llama"), stock("gpt2", 1, n_embd=24), stock("qwen2", 2, hidden_size=8, num_hidden_layers=2)]


ENCODERS = {"expert": {}, "own": {"encoder": stock("llama", 9), "layer": 1}, "embedding": {"layer": -1},
            "own embedding": {"encoder": stock("gpt2", 8), "layer": -1}}  # fmt: skip
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)


@torch.no_grad()
@every_encoder
def test_every_row_is_its_model(encoder):
    models = unlike()
    made = models_mixture(models, **encoder)
    set_gates(made, scale=20.0)
    ids = draw_ids(12)
    logits = made(ids).logits
    chosen = made.last_decisions[0].experts[:, 0].tolist()
    assert len(set(chosen)) > 1
    assert chosen == made.choose([row.tolist() for row in ids], batch_size=5)
    for row, expert in enumerate(chosen):
        assert far(logits[row], models[expert](ids[row : row + 1]).logits[0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_cached_decode_keeps_models_and_padding_does_not_matter(pooling):
    models = unlike()
    made = models_mixture(models, pooling=pooling)
    set_gates(made, scale=20.0)
    ids, read = draw_ids(8, 12), (torch.arange(12) < 4).int().expand(8, 12)
    whole = made(ids, routing_mask=read).logits
    chosen = made.last_decisions[0].experts
    assert len(chosen.unique()) > 1
    for cuts in ((4, 1, 1, 1, 1, 4), (4, 8), (6, 6)):
        cache, start, found = None, 0, []
        for size in cuts:
            out = made(ids[:, start : start + size], past_key_values=cache, use_cache=True,
                       routing_mask=read[:, :size] if start == 0 else None)  # fmt: skip
            cache, start = out.past_key_values, start + size
            found.append(out.logits)
            assert cache.get_seq_length() == start and torch.equal(made.last_decisions[0].experts, chosen)
        assert far(torch.cat(found, dim=1), whole) <= 2e-5
    pad = torch.zeros(8, 3, dtype=torch.int64)
    mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
    padded = made(torch.cat([pad, ids], dim=1), attention_mask=mask,
                  position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0))  # fmt: skip
    assert far(padded.logits[:, 3:], made(ids).logits) <= 2e-5


@torch.no_grad()
def test_generation_and_beams():
    models = unlike()
    made = models_mixture(models)
    set_gates(made, scale=20.0)
    ids = draw_ids(6, 6)
    chosen = made.choose([row.tolist() for row in ids])
    for how in ({}, {"num_beams": 3, "length_penalty": 0.0}):
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
        found = made.generate(ids, **settings)
        for row, expert in enumerate(chosen):
            assert torch.equal(found[row : row + 1], models[expert].generate(ids[row : row + 1], **settings))


@torch.no_grad()
def test_heads_of_other_widths_and_what_is_refused():
    models = [stock(), stock("llama", 1, vocab_size=70)]
    made = models_mixture(models)
    made.gate.weight.data[0] = 0
    set_gates(made, scale=20.0)
    ids = draw_ids(8)
    out = made(ids)
    chosen = made.last_decisions[0].experts[:, 0].tolist()
    assert set(chosen) == {0, 1} and out.logits.shape[-1] == 70
    assert (out.logits[chosen.index(0), :, 64:] == torch.finfo(torch.float32).min).all()
    with pytest.raises(ValueError, match="leave it out"):
        made(ids, past_key_values=DynamicCache(config=models[0].config))
    with pytest.raises(ValueError, match="takes input_ids"):
        made(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="its own cache"):
        made.generate(ids, max_new_tokens=2, cache_implementation="static")
    apart = models_mixture(models, tokenizers=["tokenizers/a", "tokenizers/b"])
    with pytest.raises(ConfigError, match=r"m0, m1.*vocabularies of their own.*Scorer"):
        apart(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [{"name": "a", "config": {}}]}, r"experts\[0\].config"),
        ({"encoder": {"expert": 2}}, "encoder.expert is 2"),
        ({"encoder": {"expert": None}}, "neither a config nor"),
        ({"router": {"layer": 3}}, "router.layer is 3"),
        ({"router": {"type": "subspace"}}, "linear or mlp"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, changes, message):
    one = {"name": "a", "config": stock().config.to_dict(), "tokenizer": None}
    document = {"model_type": "honeloom_models", "experts": [one, one], "encoder": {"expert": 0}, **changes}
    (tmp_path / "config.json").write_text(json.dumps(document, default=str))
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


@torch.no_grad()
@every_encoder
def test_files_come_back_as_they_were(tmp_path, encoder):
    tied = stock("llama", 1, tie_word_embeddings=True)
    made = models_mixture([stock(), tied], **encoder)
    set_gates(made, scale=20.0)
    made.save_pretrained(tmp_path / "one")
    again, ids = load_model(tmp_path / "one"), draw_ids()
    assert torch.equal(again(ids).logits, made(ids).logits)
    again.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    names = set(again.state_dict())
    assert {"experts.1.model.layers.0.mlp.up_proj.weight", "gate.weight"} <= names
    inner = sorted(n for n in names if n.startswith("encoder."))
    assert bool(inner) == ("encoder" in encoder) and not any("norm.weight" in n and "layers" not in n for n in inner)
    assert not any("lm_head" in n or "ln_f" in n for n in inner)
    half = load_model(tmp_path / "one", loading=Loading(dtype="bf16"))
    assert half.gate.weight.dtype == torch.float32 and half.experts[0].dtype == torch.bfloat16
    assert half(ids).logits.isfinite().all()


def test_transformers_alone_refuses_the_folder(tmp_path):
    models_mixture([stock()]).save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0 and "honeloom_models" in found.stderr


# Text: a model with the lab's tokenizer and template, and a real one with a vocabulary of its own and no template.


@pytest.fixture(scope="module")
def parts(stories260k, tiny_model) -> tuple[Path, Path]:
    return tiny_model, stories260k


@pytest.fixture
def folder(tmp_path, parts) -> Path:
    """The first model reads for the router."""
    models = [load_model(p) for p in parts]
    made = models_mixture(models, tokenizers=["tokenizers/tiny", "tokenizers/stories"], bias=True)
    names = {"tokenizers/tiny": parts[0], "tokenizers/stories": parts[1]}
    written = write_models(tmp_path / "mixture", made, names, parts[0])
    scorer = Scorer.open(written)
    split(scorer.model, lambda: list(scorer.losses([asked(i) for i in range(12)])))
    scorer.model.save_pretrained(written)
    return written


def split(model, run) -> None:
    """Set the gate so that half of what `run` shows to it goes to either model."""
    seen = []
    handle = model.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run()
    handle.remove()
    states = torch.cat(seen)
    direction = torch.linalg.svd(states - states.mean(dim=0))[2][0]
    order = (states @ direction).sort().values
    model.gate.weight.data.zero_()
    model.gate.weight.data[1] = direction
    model.gate.bias.data.zero_()
    model.gate.bias.data[1] = -(order[len(order) // 2 - 1] + order[len(order) // 2]) / 2


def asked(i: int) -> Row:
    return Row(f"r{i}", "chat", HERE, "rows", turns=(Turn("user", f"Say {i}."), Turn("assistant", f"It is {i}.")))


def chat(i: int) -> Row:
    words = ("one", "two", "the dog", "a cat sat", "5 + 7", "Lily went home")[i % 6]
    return Row(f"c{i}", "chat", HERE, "rows", turns=(Turn("user", f"Say {words} {i}."), Turn("assistant", f"{words}!")))


def mixed_rows(count: int = 18) -> list[Row]:
    """Chat, plain text, and long ones among them."""
    rows = [chat(i) for i in range(count)]
    for i in range(0, count, 3):
        rows[i] = Row(f"t{i}", "text", HERE, "rows", text=f"Once upon a time, {'Tom ran. ' * (i % 4 + 1)}{i}")
    return rows


def test_rows_are_scored_by_their_models_tokenizer(folder, parts):
    scorer = Scorer.open(folder, batch_size=3)
    assert isinstance(scorer, RoutedScorer)
    rows = mixed_rows()
    split(scorer.model, lambda: list(scorer.losses(rows)))
    scorer.routes.clear()
    found = list(scorer.losses(rows))
    assert [row.id for row, _ in found] == [row.id for row in rows] and scorer.unscored == []
    assert len(scorer.routes) == len(rows) and set(scorer.routes) == {0, 1}
    alone = [{r.id: x for r, x in Scorer.open(p, batch_size=3).losses(rows)} for p in parts]
    for (row, loss), expert in zip(found, scorer.routes, strict=True):
        expected = alone[expert][row.id]
        assert loss.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
        assert (loss.tokens, loss.chars) == (expected.tokens, expected.chars)
        assert loss.chars == len(row.text if row.kind == "text" else row.turns[-1].content)
    one = Scorer.open(folder, batch_size=1)
    one.model.gate.load_state_dict(scorer.model.gate.state_dict())
    list(one.losses(rows))
    assert one.routes == scorer.routes


def test_the_router_reads_the_prompt_alone(folder):
    scorer = Scorer.open(folder)
    answers = [Turn("assistant", text) for text in ("yes", "a b c d e f", "Lily went home 9 9 9")]
    for i in range(6):
        question = chat(i).turns[0]
        rows = [Row(f"{j}", "chat", HERE, "rows", turns=(question, a)) for j, a in enumerate(answers)]
        scorer.routes.clear()
        list(scorer.losses(rows))
        assert len(set(scorer.routes)) == 1


def test_choices_of_a_row_are_scored_by_one_model(folder, parts):
    rows = [
        Row(f"q{i}", "choice", HERE, "rows", turns=(Turn("user", f"{i} + 1"),), choices=("a", "bb", "ccc"), answer=1)
        for i in range(9)
    ]
    scorer = Scorer.open(folder, batch_size=2)
    split(scorer.model, lambda: list(scorer.choices(rows)))
    scorer.routes.clear()
    found = list(scorer.choices(rows))
    assert [r.id for r, _ in found] == [r.id for r in rows] and set(scorer.routes) == {0, 1}
    alone = [[x for _, x in Scorer.open(p, batch_size=2).choices(rows)] for p in parts]
    for i, ((_, score), expert) in enumerate(zip(found, scorer.routes, strict=True)):
        assert score.losses == pytest.approx(alone[expert][i].losses, rel=1e-5)
        assert score.chars == (1, 2, 3)


def test_rows_that_cannot_be_read_are_told_and_the_others_keep_their_order(folder):
    scorer = Scorer.open(folder, batch_size=2, max_length=12)
    rows = mixed_rows(6)
    rows[2] = Row("long", "chat", HERE, "rows", turns=(Turn("user", "why " * 90), Turn("assistant", "so")))
    rows.append(rows[1])
    found = [row.id for row, _ in scorer.losses(rows)]
    missed = [row.id for row, _ in scorer.unscored]
    assert "long" in missed and found == [r.id for r in rows if r.id not in missed]
    assert len(scorer.routes) == len(found)


def test_prompts_are_answered_by_their_models_with_the_same_draws(folder, parts):
    generator = Generator.open(folder, batch_size=2)
    assert isinstance(generator, RoutedGenerator)
    prompts = [chat(i).turns[0].content for i in range(8)]
    how = {"seed": 5, "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.95}
    split(generator.model, lambda: generator.generate(prompts, **how))
    found = generator.generate(prompts, **how)
    assert set(generator.routes) == {0, 1}
    alone = [Generator.open(p, batch_size=3).generate(prompts, **how) for p in parts]
    assert found == [alone[e][i] for i, e in enumerate(generator.routes)]
    np.testing.assert_array_equal(generator.vectors(prompts), Generator.open(parts[0]).vectors(prompts))
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        generator.generate(prompts, **{**how, "max_new_tokens": 0})


def test_vectors_of_rows_are_the_encoders(folder, parts):
    rows = mixed_rows(4)
    mixed, alone = (
        np.concatenate(list(Embedder.open(p, layer=1.0, loading=Loading(), batch_size=2).embed(rows)))
        for p in (folder, parts[0])
    )
    np.testing.assert_allclose(mixed, alone, rtol=1e-5)


def test_ids_are_refused_unless_the_tokenizers_agree(folder, tmp_path, parts):
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ConfigError, match="vocabularies of their own"):
        load_model(folder)(ids)
    same = models_mixture([load_model(parts[0])] * 2, tokenizers=["tokenizers/a", "tokenizers/b"])
    names = {f"tokenizers/{n}": parts[0] for n in "ab"}
    written = write_models(tmp_path / "same", same, names, parts[0])
    with torch.no_grad():
        assert far(load_model(written)(ids).logits, load_model(parts[0])(ids).logits) <= 1e-5


def test_tokenizers_that_are_missing_or_elsewhere_are_errors(folder):
    document = json.loads((folder / "config.json").read_text())
    for place, message in (("tokenizers/none", "no tokenizer"), ("../..", "outside of the mixture")):
        document["experts"][1]["tokenizer"] = place
        (folder / "config.json").write_text(json.dumps(document))
        with pytest.raises(SourceError, match=message):
            Scorer.open(folder)


def test_tokenizers_belong_to_the_models_content(folder, parts):
    names = model_files(folder)
    assert {"tokenizers/tiny/tokenizer.json", "tokenizers/stories/tokenizer.json", "config.json"} <= set(names)
    before = resolve_model(str(folder)).fingerprint
    file = folder / "tokenizers" / "stories" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": 1}))
    assert resolve_model(str(folder)).fingerprint != before
    assert not any("/" in name for name in model_files(parts[0]))


def test_other_folders_named_tokenizers_do_not_count(tmp_path, tiny_model):
    other = tmp_path / "model"
    load_model(tiny_model).save_pretrained(other)
    copy_tokenizer(tiny_model, other)
    before = resolve_model(str(other)).fingerprint
    (other / "tokenizers" / "x").mkdir(parents=True)
    copy_tokenizer(tiny_model, other / "tokenizers" / "x")
    assert resolve_model(str(other)).fingerprint == before


def test_evaluate_works_end_to_end(folder, parts, tmp_path):
    rows = tmp_path / "rows.jsonl"
    records = [{"id": f"r{i}", "instruction": f"Say {i}.", "input": "", "output": f"It is {i}.", "domain": "ab"[i % 2]}
               for i in range(12)]  # fmt: skip
    records += [{"id": f"q{i}", "question": f"{i} + 1", "choices": ["a", "b"], "answer": 0} for i in range(4)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in records))
    report = honeloom.evaluate(str(folder), rows=[str(rows)], against=str(parts[1]), output_dir=tmp_path / "out")
    names = {m.name for m in report.metrics}
    assert {"loss", "bits_per_char", "accuracy"} <= names
    assert report.details["against"]["metric"] == "bits_per_char" and report.details["against"]["n"] == 12
    scorer = Scorer.open(folder)
    losses = [x for _, x in scorer.losses([asked(i) for i in range(12)])]
    assert set(scorer.routes) == {0, 1}
    chars = sum(len(r["output"]) for r in records[:12])
    bits = next(m.value for m in report.metrics if m.name == "bits_per_char" and m.domain == "all")
    assert bits == pytest.approx(sum(x.loss_sum for x in losses) / np.log(2) / chars, rel=1e-5)
