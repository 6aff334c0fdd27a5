"""In-run Shapley values, LESS and TracIn on a linear regression, where every gradient is known."""

import math

import numpy as np
import pytest

from honeloom.errors import RowsError
from honeloom.selection.in_run import draw, first_order_values, in_run, row_batches
from honeloom.selection.influence import checkpoint_rates, cosines, less, target_directions, tracin
from honeloom.testing.fakes import FakeGradients, FakeModel, FakeRows, chat_row
from honeloom.types.ports import SelectionData

GENERATOR = np.random.default_rng(0)
X, TRUE = GENERATOR.normal(size=(40, 5)), np.array([1.0, -2.0, 0.5, 0.0, 3.0])
START = np.array([0.3, 0.1, -0.2, 0.4, 0.0])
ROWS = [chat_row(f"r{i}", "q", "a", domain="ab"[i % 2]) for i in range(30)]
TARGET = [chat_row(f"r{i}", "q", "a", domain="ab"[i % 2]) for i in range(30, 40)]
WARM = {"checkpoints": 1, "warmup": 1.0, "batch_size": 30, "lr": 0.01, "rank": 1, "target_rows": 99}


def point(row):
    i = int(row.id[1:])
    wrong = 10.0 if i % 7 == 0 else 0.0
    return X[i], float(X[i] @ TRUE) + wrong * (i < 30)


def port(skip=()):
    return FakeGradients(lambda row: None if row.id in skip else point(row), START)


def data(rows=ROWS, seed=0, skip=()):
    return SelectionData(
        FakeRows(rows), lambda: FakeModel(lambda r, w: 1.0), seed, target=FakeRows(TARGET),
        open_gradients=lambda rank: port(skip),
    )  # fmt: skip


def gradients(rows, weights):
    points = [point(row) for row in rows]
    return np.array([(x @ weights - y) * x for x, y in points])


def test_one_step_gives_the_analytic_products():
    values = first_order_values(port(), ROWS, TARGET, epochs=1, batch_size=30, lr=0.01, seed=0)
    aim = gradients(TARGET, START).mean(axis=0)
    assert np.allclose(values, 0.01 * gradients(ROWS, START) @ aim / 30, atol=1e-12)


def test_values_sum_to_what_the_steps_lower_the_target_by():
    fake, expected = port(), 0.0
    values = first_order_values(fake, ROWS, TARGET, epochs=2, batch_size=8, lr=1e-3, seed=3)
    replay = port()
    batches = row_batches([r.id for r in ROWS], 2, 8, 3)
    for step, batch in enumerate(batches):
        if step % 2 == 0:  # ten rows of target, eight a step
            replay.aim(TARGET)
        owed = replay.train([ROWS[i] for i in batch], lr=1e-3 * (1 - step / len(batches)))
        expected += owed.sum()
    assert values.sum() == pytest.approx(expected, abs=1e-12)

    def loss(weights):
        return np.mean([(x @ weights - y) ** 2 / 2 for x, y in map(point, TARGET)])

    assert values.sum() == pytest.approx(loss(START) - loss(fake.weights), rel=0.1)


def test_wrong_rows_are_worth_less_near_the_truth():
    near = FakeGradients(point, TRUE + 0.1)
    values = first_order_values(near, ROWS, TARGET, epochs=4, batch_size=5, lr=0.05, seed=0)
    wrong = np.array([i % 7 == 0 for i in range(30)])
    assert np.median(values[wrong]) < np.median(values[~wrong])


@pytest.mark.parametrize(
    "method",
    [
        lambda d: in_run(d, epochs=2, batch_size=7, lr=0.01, rank=1, target_rows=6),
        lambda d: less(d, **WARM | {"target_rows": 6, "warmup": 0.3}, size=16, mode="standard"),
        lambda d: less(d, **WARM | {"target_rows": 6, "warmup": 0.3}, size=16, mode="less-paper"),
        lambda d: tracin(d, **WARM | {"target_rows": 6, "warmup": 0.3}),
    ],
)
def test_scores_follow_the_rows_and_unscored_ones_are_last(method):
    first, backwards = method(data(skip={"r4"})), method(data(ROWS[::-1], skip={"r4"}))
    assert np.allclose(first.value, backwards.value[::-1], atol=1e-12)
    assert [i for i, v in enumerate(first.value) if v == -math.inf] == [4]
    assert method(data(skip={"r4"})).value == first.value
    assert method(data(seed=1)).value != method(data()).value


def test_tracin_is_the_sum_of_rates_times_products():
    fake, expected = port(), np.zeros(30)
    for rate in checkpoint_rates(fake, draw(FakeRows(ROWS), 30, seed=0, name="influence/warmup"), checkpoints=3,
                                 batch_size=10, lr=0.01, seed=0):  # fmt: skip
        expected += rate * gradients(ROWS, fake.weights) @ gradients(TARGET, fake.weights).mean(axis=0)
    found = tracin(data(), **WARM | {"checkpoints": 3, "batch_size": 10})
    assert np.allclose(found.value, expected, atol=1e-12)


def test_less_is_the_cosine_of_the_adam_step_with_the_target():
    weights = START - 0.01 * gradients(ROWS, START).mean(axis=0)  # the warm-up: one step on all rows
    steps, aims = np.sign(gradients(ROWS, weights)), gradients(TARGET, weights)
    groups = [aims[0::2].mean(axis=0), aims[1::2].mean(axis=0)]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    best = [0.01 * max(cosine(s, g) for g in groups) for s in steps]
    assert np.allclose(less(data(), **WARM, size=16, mode="less-paper").value, best, atol=1e-6)
    mean = [np.mean([cosine(s, g) for g in aims]) for s in steps]
    assert np.allclose(less(data(), **WARM, size=16, mode="standard").value, mean, atol=1e-6)


def test_the_standard_mode_looks_once_the_warm_up_is_over():
    settings = WARM | {"checkpoints": 3, "batch_size": 10}
    fake = port()
    warm = draw(FakeRows(ROWS), 30, seed=0, name="influence/warmup")
    list(checkpoint_rates(fake, warm, checkpoints=3, batch_size=10, lr=0.01, seed=0))
    steps, aims = np.sign(gradients(ROWS, fake.weights)), gradients(TARGET, fake.weights)
    aims /= np.linalg.norm(aims, axis=1, keepdims=True)
    expected = steps @ aims.mean(axis=0) / np.linalg.norm(steps, axis=1)
    assert np.allclose(less(data(), **settings, size=16, mode="standard").value, expected, atol=1e-6)


def test_rates_are_the_means_on_the_way_to_each_checkpoint():
    rates = list(checkpoint_rates(port(), ROWS[:20], checkpoints=2, batch_size=10, lr=1.0, seed=0))
    assert rates == [pytest.approx((1 + 0.75) / 2), pytest.approx((0.5 + 0.25) / 2)]


def test_directions_leave_out_rows_without_gradient():
    known = np.array([[3.0, 4.0], [np.nan, np.nan], [0.0, 2.0]])
    assert np.allclose(target_directions(known, ["a", "b", "a"], "mean"), [[0.3, 0.9]])
    assert np.allclose(target_directions(known, ["a", "b", "a"], "max"), [[3 / 45**0.5, 6 / 45**0.5]])
    assert cosines(np.zeros((1, 2)), np.ones((1, 2))).tolist() == [[0.0]]
    with pytest.raises(RowsError, match="none of the 1 target rows"):
        target_directions(known[1:2], ["b"], "mean")


def test_draws_depend_on_ids_alone():
    drawn = draw(FakeRows(ROWS), 5, seed=1, name="x")
    assert drawn == draw(FakeRows(ROWS[::-1]), 5, seed=1, name="x")
    assert drawn != draw(FakeRows(ROWS), 5, seed=2, name="x")
    assert len(draw(FakeRows(ROWS), 99, seed=1, name="x")) == 30
