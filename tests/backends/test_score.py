"""Losses: equal to plain transformers, and independent of batches and padding."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from honeloom import lab
from honeloom.backends.hf.load import load_model
from honeloom.backends.hf.score import Scorer
from honeloom.errors import NotFiniteError, OutOfMemoryError
from honeloom.testing.fakes import chat_row
from honeloom.types.rows import Row, Turn, Where

ROWS = [chat_row(f"r{i}", f"Add {i} and {2 * i}." * (i % 3 + 1), str(3 * i)) for i in range(9)]


@pytest.fixture(scope="module")
def scorer():
    return Scorer.open(lab.base_path(), batch_size=4)


def test_loss_equals_plain_transformers(scorer):
    model = AutoModelForCausalLM.from_pretrained(lab.base_path(), dtype=torch.float32).eval()
    for row, loss in scorer.losses(ROWS):
        encoded = scorer.encoder.encode(row)
        ids = torch.tensor([encoded.ids])
        labels = torch.where(torch.tensor([encoded.scored]), ids, -100)
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=labels).loss)
        assert loss.mean == pytest.approx(expected, rel=1e-5)
        assert loss.tokens == encoded.targets


def test_batch_size_does_not_change_losses(scorer):
    alone = Scorer(scorer.model, scorer.encoder, 1)
    for (_, a), (_, b) in zip(scorer.losses(ROWS), alone.losses(ROWS), strict=True):
        assert a.loss_sum == pytest.approx(b.loss_sum, rel=1e-5)


def test_rows_come_back_in_order(scorer):
    assert [row.id for row, _ in scorer.losses(ROWS)] == [r.id for r in ROWS]


def test_rows_without_room_are_named_not_dropped_silently(scorer):
    short = Scorer(scorer.model, type(scorer.encoder)(scorer.encoder.tokenizer, 3), 2)
    assert list(short.losses(ROWS[:2])) == []
    assert [r.id for r, _ in short.unscored] == ["r0", "r1"]


def test_the_likelier_choice_wins(scorer):
    row = Row(
        "c", "choice", Where("f", 1), "s", turns=(Turn("user", "Add 2 and 3."),), choices=("zz]]{{", "5"), answer=1
    )
    [(_, choice)] = list(scorer.choices([row]))
    assert choice.best(per_char=False) == 1
    assert choice.losses[1] < choice.losses[0]


def test_nan_weights_are_an_error_not_a_number():
    model = load_model(lab.base_path())
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    broken = Scorer.open(lab.base_path())
    broken.model = model
    with pytest.raises(NotFiniteError, match="NaN"):
        list(broken.losses(ROWS[:1]))


def test_out_of_memory_says_which_setting_to_lower(scorer):
    def full(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    full.device = torch.device("cpu")
    with pytest.raises(
        OutOfMemoryError,
        match=r"2.00 GiB more were needed and .* free; try --batch-size 2, or --max-length \d+, or --load-in 4bit",
    ):
        list(Scorer(full, scorer.encoder, 4).losses(ROWS))
