"""Embeddings do not see padding; a utility begins alike every time and orders rows as the seed says."""

import pickle

import numpy as np
import pytest
import torch

from honeloom import lab
from honeloom.backends.hf.embed import Embedder
from honeloom.backends.hf.load import Loading, load_model
from honeloom.backends.hf.score import Scorer
from honeloom.backends.hf.utility import TunableModel, TuningUtility
from honeloom.testing.fakes import chat_row

ROWS = [chat_row(f"r{i}", f"Add {i} and {i}." + " Add 1 and 2." * (i % 4), str(2 * i)) for i in range(12)]


@pytest.mark.parametrize("layer", [0.0, 0.5, 1.0])
def test_a_row_has_the_vector_it_has_alone(layer):
    many = Embedder.open(lab.base_path(), layer=layer, loading=Loading("cpu"), batch_size=5)
    one = Embedder(many.model, many.encoder, many.layer, 1)
    batched, alone = (np.concatenate(list(e.embed(ROWS))) for e in (many, one))
    assert batched.shape == (12, many.size)
    # Relative to the largest number: states of the last layer are near 200, and fp32 sums differ in their last digits.
    assert np.abs(batched - alone).max() <= 1e-6 * np.abs(alone).max()
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


PLAYERS = [[row] for row in ROWS]
MODEL = TunableModel(lab.base_path(), None, "lab", Loading("cpu"), 4, 0, 8, 64)


def tuned(players=PLAYERS, **changes):
    settings = {"steps": 3, "batch_size": 4, "lr": 1e-2, "score": "loss", "seed": 0, **changes}
    return TuningUtility(MODEL, players, ROWS[:4], **settings)


@pytest.fixture
def utility():
    return tuned()


def test_nothing_is_the_model_as_it_is(utility):
    start = utility(frozenset())
    plain = Scorer(load_model(lab.base_path(), loading=Loading("cpu")), MODEL.encoder(), 8)
    losses = [loss for _, loss in plain.losses(ROWS[:4])]
    assert start == pytest.approx(-sum(x.loss_sum for x in losses) / sum(x.tokens for x in losses), abs=1e-6)


def test_every_evaluation_begins_alike(utility):
    all_of_them = frozenset(range(12))
    first, empty = utility(all_of_them), utility(frozenset())
    assert utility(frozenset({5, 7})) != utility(frozenset({1, 2}))
    assert (utility(all_of_them), utility(frozenset())) == (first, empty)
    assert first > empty + 0.1  # tuning on the development rows themselves helps


def test_seed_and_repeat_order_the_rows(utility):
    all_of_them = frozenset(range(12))
    values = {tuned(seed=1)(all_of_them), utility(all_of_them), utility.evaluate(all_of_them, 1)}
    assert len(values) == 3


@pytest.mark.parametrize("steps", [3, 1])
def test_every_player_counts_in_a_large_coalition(steps):
    """Also where the steps do not reach all rows: no player may be left out of all of them."""
    utility = tuned(steps=steps)
    everyone = frozenset(range(12))
    values = [utility(everyone - {p}) for p in range(12)]
    assert all(v != utility(everyone) for v in values)


def test_the_rows_of_players_are_mixed():
    """Two players of six rows each: a step sees rows of both, whatever the players' order."""
    utility = tuned([ROWS[:6], ROWS[6:]])
    _, _, encoded = utility._open()
    order = utility._ordered([pair for rows in encoded for pair in rows], frozenset({0, 1}), 0)
    first = [e for _, e in encoded[0]]
    owners = ["first" if e in first else "second" for e in order]
    assert owners != sorted(owners) and owners != sorted(owners, reverse=True)


def test_a_copy_for_another_process_gives_the_same_bits(utility):
    utility(frozenset({1}))
    copy = pickle.loads(pickle.dumps(utility))
    assert copy._held is None
    assert copy(frozenset({1, 2})) == utility(frozenset({1, 2}))
    assert copy.fingerprint == utility.fingerprint != tuned(lr=2e-2).fingerprint
