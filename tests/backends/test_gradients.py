"""Gradients of single rows from one backward pass: plain autograd, padding, Adam's steps, projections."""

import numpy as np
import pytest
import torch

from honeloom import lab
from honeloom.backends.hf.gradients import RowGradients, sketch
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.local_steps import build_optimizer, local_steps
from honeloom.errors import ConfigError, RowsError
from honeloom.selection.in_run import first_order_values
from honeloom.testing.fakes import chat_row
from honeloom.tuning.config import AdamWConfig

ROWS = [chat_row(f"r{i}", f"Add {i} and {i}." + " Add 1 and 2." * (i % 4), str(2 * i * 7 ** (i % 3))) for i in range(9)]
EMPTY = chat_row("empty", "Add 1 and 2. " * 50, "3")
"""Its answer is beyond the limit."""


@pytest.fixture(scope="module")
def opened():
    return RowGradients.open(
        lab.base_path(), loading=Loading("cpu", "fp32"), rank=2, seed=1, batch_size=4, max_length=64
    )


@pytest.fixture
def port(opened):
    opened.reset()
    return opened


def moved(port):
    """After three steps, so that A and B both have gradients."""
    for start in (0, 3, 6):
        port.train(ROWS[start : start + 3], lr=1e-2)
    return port


def by_autograd(port, rows):
    """One backward pass per row: flat gradients (n, parameters)."""
    found = []
    for row in rows:
        encoded = port.encoder.encode(row)
        ids = torch.tensor([encoded.ids])
        logits = port.model(input_ids=ids).logits[0, :-1]
        scored = torch.tensor(encoded.scored[1:])
        loss = torch.nn.functional.cross_entropy(logits[scored], ids[0, 1:][scored])
        weights = [p for p in port.model.parameters() if p.requires_grad]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(found).double().numpy()


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_products_are_those_of_plain_autograd(port):
    moved(port).aim(ROWS[5:])
    exact = by_autograd(port, ROWS)
    expected = exact @ exact[5:].mean(axis=0)
    found = port.alignments([*ROWS[:4], EMPTY, *ROWS[4:]])
    assert close(np.delete(found, 4), expected)
    assert np.isnan(found[4])


def test_padding_and_batches_do_not_matter(port):
    moved(port).aim([*ROWS[5:], EMPTY])
    together, sketched = port.alignments(ROWS), port.sketches(ROWS, size=64, seed=0, as_adam=True)
    assert close(np.concatenate([port.alignments([row]) for row in ROWS]), together)
    alone = np.concatenate([port.sketches([row], size=64, seed=0, as_adam=True) for row in ROWS])
    assert np.allclose(alone, sketched, atol=1e-4 * np.abs(sketched).max())


def test_at_the_start_only_b_has_gradients_and_they_are_not_zero(port):
    port.aim(ROWS[5:])
    assert all((gradient == 0).all() for name, gradient in port._direction.items() if ".lora_A." in name)
    assert (port.alignments(ROWS) != 0).all()


def test_sketches_keep_inner_products(port):
    exact = by_autograd(moved(port), ROWS)
    wanted, lengths = exact @ exact.T, np.linalg.norm(exact, axis=1)
    drawn = np.stack([s.astype(np.float64) for s in (port.sketches(ROWS, size=256, seed=k) for k in range(12))])
    errors = (drawn @ drawn.transpose(0, 2, 1) - wanted) / np.outer(lengths, lengths)
    assert np.sqrt((errors**2).mean()) < (2 / 256) ** 0.5
    assert np.abs(errors.mean(axis=0)).max() < 4 * (2 / 256 / 6) ** 0.5
    again = port.sketches(ROWS, size=256, seed=0)
    assert again.tobytes() == drawn[0].astype(np.float32).tobytes()


def test_names_have_their_own_signs_and_no_number_is_lost():
    unit = torch.eye(40)
    places = sketch(unit, 16, 0, "a")
    assert ((places != 0).sum(dim=1) == 1).all()
    assert (places.abs().sum(dim=1) == 1).all()
    assert (places.abs().sum(dim=0)[:] >= 2).all()  # forty numbers, evenly over sixteen places
    assert not torch.equal(places, sketch(unit, 16, 0, "b"))


def test_an_adam_step_is_what_adam_would_do(port):
    moved(port)
    row = ROWS[4]
    name, linear = next((n, m) for n, m in port._linears.items() if ".lora_B." in n)
    port._mean_gradient([row])
    gradient = linear.weight.grad.clone()
    step = port._adam_step(name, gradient[None])[0]
    before = linear.weight.detach().clone()
    for group in port._optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-3, 0.0
    port._optimizer.step()
    assert torch.allclose(before - linear.weight, 1e-3 * step, atol=1e-7)


def test_training_is_that_of_local_steps(port):
    same = [ROWS[0], chat_row("other", "Add 2 and 2.", "4")]  # as many scored tokens in each: both means agree
    encoded = [port.encoder.encode(row) for row in same]
    assert encoded[0].targets == encoded[1].targets
    for _ in range(2):
        port.train(same, lr=1e-2)
    found = [linear.weight.detach().clone() for linear in port._linears.values()]
    port.reset()
    local_steps(port.model, [[encoded]] * 2, build_optimizer(port.model, AdamWConfig(), 1e-2))
    expected = [linear.weight.detach() for linear in port._linears.values()]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_values_add_up_to_the_fall_of_the_targets_loss(port):
    target = ROWS[:4]

    def loss():
        with torch.no_grad():
            return sum(float(port.model(input_ids=i, labels=y).loss) for i, y in map(labelled, target)) / len(target)

    def labelled(row):
        encoded = port.encoder.encode(row)
        ids = torch.tensor([encoded.ids])
        return ids, torch.where(torch.tensor([encoded.scored]), ids, -100)

    start = loss()
    values = first_order_values(port, [*ROWS, EMPTY], target, epochs=4, batch_size=5, lr=3e-4, seed=0)
    assert np.isnan(values[-1])
    assert np.nansum(values) == pytest.approx(start - loss(), rel=0.2)


def test_reset_begins_anew(port):
    def run():
        port.reset()
        port.aim(ROWS[:3])
        return np.concatenate([port.train(ROWS[3:6], lr=1e-2), port.train(ROWS[6:], lr=1e-2)])

    assert run().tobytes() == run().tobytes()


def test_what_cannot_be_done_is_said(port):
    with pytest.raises(RowsError, match="none of the 1 target rows"):
        port.aim([EMPTY])
    with pytest.raises(ValueError, match="aim first"):
        port.alignments(ROWS)
    weights = [linear.weight.detach().clone() for linear in port._linears.values()]
    assert np.isnan(port.train([EMPTY], lr=1.0)).all()
    assert all(torch.equal(a, b.weight) for a, b in zip(weights, port._linears.values(), strict=True))


def test_layers_that_mix_the_rows_are_refused(port):
    linear = next(iter(port._linears.values()))
    with pytest.raises(ConfigError, match="--batch-size 1"), port._watched(2, lambda *_: None):
        linear(torch.zeros(6, linear.in_features))
