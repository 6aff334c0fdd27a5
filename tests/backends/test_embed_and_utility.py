"""Embeddings do not see padding; a utility begins alike every time and orders rows as the seed says."""

import numpy as np
import pytest
import torch

from honeloom import lab
from honeloom.backends.hf import tune as tuning
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.embed import Embedder
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer
from honeloom.backends.hf.score import Scorer
from honeloom.backends.hf.utility import TuningUtility
from honeloom.testing.fakes import chat_row

ROWS = [chat_row(f"r{i}", f"Add {i} and {i}." + " Add 1 and 2." * (i % 4), str(2 * i)) for i in range(12)]


@pytest.mark.parametrize("layer", [0.0, 0.5, 1.0])
def test_a_row_has_the_vector_it_has_alone(layer):
    many = Embedder.open(lab.base_path(), layer=layer, loading=Loading("cpu"), batch_size=5)
    one = Embedder(many.model, many.encoder, many.layer, 1)
    batched, alone = (np.concatenate(list(e.embed(ROWS))) for e in (many, one))
    assert batched.shape == (12, many.size)
    assert np.allclose(batched, alone, atol=1e-5)
    ids = torch.tensor([many.encoder.encode(ROWS[3]).ids])
    states = many.model(ids, output_hidden_states=True).hidden_states
    if layer < 1:  # transformers normalises the last one
        expected = states[many.layer + 1][0].mean(dim=0).detach().numpy()
        assert np.allclose(batched[3], expected, atol=1e-5)


def test_a_row_without_tokens_has_no_vector():
    embedder = Embedder.open(lab.base_path(), layer=1.0, loading=Loading("cpu"), batch_size=4)
    embedder._encode = lambda row: None if row.id == "r1" else Embedder._encode(embedder, row)
    found = np.concatenate(list(embedder.embed(ROWS[:3])))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.fixture
def utility():
    model = tuning.add_lora(
        load_model(lab.base_path(), loading=Loading("cpu")), rank=4, alpha=None, dropout=0.0, targets="all-linear",
        rslora=False,
    )  # fmt: skip
    encoder = Encoder(load_tokenizer(lab.base_path()), 64, train=True)
    scorer = Scorer(model, encoder, 8)
    players = [[encoder.encode(row)] for row in ROWS]
    return TuningUtility(
        scorer, players, [r.id for r in ROWS], ROWS[:4], steps=3, batch_size=4, lr=1e-2, score="loss", seed=0
    )


def test_nothing_is_the_model_as_it_is(utility):
    start = utility(frozenset())
    plain = Scorer(load_model(lab.base_path(), loading=Loading("cpu")), utility.scorer.encoder, 8)
    losses = [loss for _, loss in plain.losses(ROWS[:4])]
    assert start == pytest.approx(-sum(x.loss_sum for x in losses) / sum(x.tokens for x in losses), abs=1e-6)


def test_every_evaluation_begins_alike(utility):
    all_of_them = frozenset(range(12))
    first, empty = utility(all_of_them), utility(frozenset())
    assert utility(frozenset({5, 7})) != utility(frozenset({1, 2}))
    assert (utility(all_of_them), utility(frozenset())) == (first, empty)
    assert first > empty + 0.1  # tuning on the development rows themselves helps


def test_the_seed_orders_the_rows(utility):
    other = TuningUtility(
        utility.scorer, utility.players, [r.id for r in ROWS], ROWS[:4], steps=3, batch_size=4, lr=1e-2, score="loss",
        seed=1,
    )  # fmt: skip
    assert other(frozenset(range(12))) != utility(frozenset(range(12)))
