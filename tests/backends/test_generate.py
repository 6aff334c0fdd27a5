"""Text does not hang on the batch, follows the seed, and ends where the model ends it; features see no padding."""

import numpy as np
import pytest
import torch

from honeloom import lab
from honeloom.backends.hf.embed import Embedder
from honeloom.backends.hf.generate import Generator, _draw
from honeloom.backends.hf.load import Loading
from honeloom.selection.probe import cross_fit
from honeloom.selection.vectors import unit_blocks
from honeloom.testing.fakes import chat_row

PROMPTS = ["Add 12 and 30.", "Reverse 'abc'.", "What is 7 plus 5?", "Is 40 more than 12?", "Add 1 and 2 and 3."]
SAMPLED = {"seed": 3, "max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def generator():
    return Generator.open(lab.base_path(), loading=Loading("cpu", "fp32"), batch_size=3)


def test_the_likeliest_answer_is_that_of_transformers(generator):
    tokenizer = generator.encoder.tokenizer
    found = generator.generate(PROMPTS, seed=0, max_new_tokens=12, temperature=0, top_p=1)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([generator.encoder.prompt(prompt)])
        wanted = generator.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert answer == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert found[0].strip() == "42"


def test_what_is_drawn_follows_from_the_seed_and_the_place_not_from_the_batch(generator):
    together = generator.generate(PROMPTS, **SAMPLED)
    alone = Generator(generator.model, generator.encoder, 1)
    state = torch.get_rng_state()
    assert alone.generate(PROMPTS, **SAMPLED) == together == generator.generate(PROMPTS, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), state)
    hot = {**SAMPLED, "temperature": 8.0}
    assert generator.generate(PROMPTS, **hot) != generator.generate(PROMPTS, **{**hot, "seed": 4})
    assert len(set(generator.generate(PROMPTS[:1] * 6, **hot))) > 1


def test_a_prompt_without_room_is_answered_by_nothing(generator):
    found = generator.generate(["a b c " * 60, PROMPTS[0]], seed=0, max_new_tokens=500, temperature=0, top_p=1)
    assert found[0] == ""
    assert found[1].strip() == "42"
    assert generator.generate([], **SAMPLED) == []


def test_tokens_are_drawn_by_their_probability_within_the_mass():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)).expand(20_000, 4)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.bincount(_draw(logits, draws, 1.0, 1.0), minlength=4) / 20_000
    assert torch.allclose(shares.double(), logits[0].exp(), atol=0.012)
    cut = torch.bincount(_draw(logits, draws, 1.0, 0.7), minlength=4) / 20_000
    assert torch.allclose(cut, torch.tensor([0.625, 0.375, 0, 0]), atol=0.012)
    assert _draw(logits[:2], torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0).tolist() == [0, 3]
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="need >= 1"):
            Generator.generate(None, ["x"], **{**SAMPLED, **wrong})


def test_vectors_are_mean_input_embeddings(generator):
    found = generator.vectors(["Add 12 and 30.", "", "Add 12 and 30."])
    ids = generator.encoder.tokenizer("Add 12 and 30.", add_special_tokens=False)["input_ids"]
    wanted = generator.model.get_input_embeddings().weight[ids].mean(dim=0).detach().numpy()
    assert np.allclose(found[0], wanted, atol=1e-6)
    assert (found[0] == found[2]).all() and not found[1].any()


def test_features_and_entropies_do_not_see_the_batch():
    rows = [chat_row(f"r{i:03}", f"Add {i} and {i}." + " Add 1 and 2." * (i % 4), str(2 * i)) for i in range(63)]
    rows.append(chat_row("r063", "Add 1 and 2. " * 14, "3"))  # what the others are padded to
    one = Embedder.open(lab.base_path(), layer=0.1, loading=Loading("cpu", "fp32"), batch_size=1)
    many = Embedder(one.model, one.encoder, one.layer, 32)
    alone, batched = (np.concatenate(list(e.embed(rows))) for e in (one, many))
    assert np.abs(alone - batched).max() <= 1e-5
    units = [next(unit_blocks(v, standardise=True)) for v in (alone, batched)]
    labels, ids = np.arange(64) % 4 // 2, [r.id for r in rows]
    first, second = (cross_fit(u, labels, 2, ids=ids, seed=0).entropies for u in units)
    assert np.abs(first - second).max() <= 1e-5
