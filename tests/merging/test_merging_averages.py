"""Averages of whole models and of task vectors, on hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_checks import DTYPES, drawn, dtypes, require_same_bits_in_pieces, shapes, t

from honeloom.errors import ConfigError
from honeloom.merging.fisher import fisher
from honeloom.merging.linear import linear
from honeloom.merging.magmax import magmax
from honeloom.merging.passthrough import passthrough
from honeloom.merging.regmean import regmean
from honeloom.merging.task_vectors import task_arithmetic
from honeloom.ops.rounding import round_once


def test_linear_by_hand():
    assert linear([t(1, 2), t(3, 6)], [1, 3]).tolist() == [2.5, 5]
    assert linear([t(1, 2), t(3, 6)], [1, 3], normalize=False).tolist() == [10, 20]
    assert linear([t(3, 6)], [0.7]).tolist() == [3, 6]
    with pytest.raises(ConfigError, match="sum to 0"):
        linear([t(1), t(2)], [1, -1])
    assert linear([t(1), t(2)], [1, -1], normalize=False).tolist() == [-1]


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_the_average_of_equals_is_bit_exact(dtype):
    (x,) = drawn((4096,), 1, dtype)
    assert torch.equal(round_once(linear([x, x, x], [1 / 3] * 3), dtype), x)
    assert torch.equal(round_once(linear([x, x, x]), dtype), x)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, dtype=dtypes, weights=st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
def test_linear_is_the_rounded_exact_average(shape, dtype, weights):
    tensors = drawn(shape, 3, dtype)
    merged = linear(tensors, weights)
    columns = zip(*(x.double().reshape(-1).tolist() for x in tensors), strict=True)
    exact = [math.fsum(w * v for w, v in zip(weights, c, strict=True)) / math.fsum(weights) for c in columns]
    torch.testing.assert_close(merged.reshape(-1), t(*exact), rtol=1e-14, atol=1e-14)


def test_task_arithmetic_by_hand():
    assert task_arithmetic([t(2, 1), t(1, 3)], [0.5, 0.25], base=t(1, 1), scale=2).tolist() == [2, 2]
    assert task_arithmetic([t(2, 4), t(4, 8)], [1, 3], base=t(0, 0), normalize=True).tolist() == [3.5, 7]
    with pytest.raises(ConfigError, match="sum to 0"):
        task_arithmetic([t(1), t(2)], [1, -1], base=t(1), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_task_arithmetic_ends(dtype):
    base, tuned = drawn((4096,), 2, dtype)
    assert torch.equal(round_once(task_arithmetic([tuned], base=base, scale=0), dtype), base)
    assert torch.equal(round_once(task_arithmetic([tuned], base=base), dtype), tuned)


def test_passthrough_keeps_bits_and_scales():
    x = t(1.5, -0.0, 2)
    assert torch.equal(passthrough([x]).view(torch.int64), x.view(torch.int64))
    assert passthrough([x], scale=2).tolist() == [3, 0, 4]
    assert passthrough([x], scale=[0.5]).tolist() == [0.75, 0, 1]
    with pytest.raises(ValueError, match="2 values for 1 models"):
        passthrough([x], scale=[1, 2])


def test_magmax_by_hand():
    assert magmax([t(1, -5), t(-2, 3)], base=t(0, 0)).tolist() == [-2, -5]
    assert magmax([t(2, 6), t(0, 5)], base=t(1, 1), scale=2).tolist() == [3, 11]
    assert magmax([t(1), t(-1)], base=t(0)).tolist() == [1], "of one size the first counts"
    assert magmax([t(1), t(-1)], base=t(0), weights=[1, 2]).tolist() == [-2]


def test_fisher_by_hand():
    assert fisher([t(0), t(4)], data=[t(1), t(3)]).tolist() == pytest.approx([3], abs=1e-12)
    assert fisher([t(0), t(4)], [3, 1], data=[t(1), t(3)]).tolist() == pytest.approx([2], abs=1e-12)
    assert fisher([t(1, 2), t(3, 6)], data=[t(5, 5), t(5, 5)]).tolist() == pytest.approx([2, 4])
    assert fisher([t(1, 2), t(3, 6)], [1, 3]).tolist() == [2.5, 5]
    assert fisher([t(1, 2), t(3, 6)], data=[t(0, 0), t(0, 0)]).tolist() == [2, 4]
    assert fisher([t(1, 2), t(3, 6)], data=[t(0, 2), t(0, 6)]).tolist()[0] == pytest.approx((1 * 1 + 3 * 3) / 4)
    # Here the first entry has eps times the mean alone: (1 + 0.5) / (0.5 + 1.5) and so on.
    assert fisher([t(0), t(4)], data=[t(1), t(3)], eps=1.0).tolist() == pytest.approx([3])
    assert fisher([t(0, 0), t(4, 4)], data=[t(2, 0), t(0, 2)], eps=1.0).tolist() == pytest.approx([1 / 4 * 4, 3])


def test_fisher_refuses():
    with pytest.raises(ConfigError, match=r"q: 1 of 2 models have a Fisher diagonal; give one for each, or for none"):
        fisher([t(1), t(2)], data=[t(1), None], name="q")
    with pytest.raises(ConfigError, match=r"\[2, -1\]; fisher needs weights of 0 or more"):
        fisher([t(1), t(2)], [2, -1])
    with pytest.raises(ConfigError, match="sum to 0"):
        fisher([t(1), t(2)], [0, 0])


@settings(max_examples=15, deadline=None)
@given(shape=shapes, dtype=dtypes)
def test_fisher_in_pieces_lies_between_the_models(shape, dtype):
    tensors = drawn(shape, 3, dtype)
    data = [x.double().square() for x in drawn(shape, 6)[3:]]
    merged = require_same_bits_in_pieces(fisher, tensors, [1.0, 2.0, 0.0], data=data)
    low, high = (f(tensors[0].double(), tensors[1].double()) for f in (torch.minimum, torch.maximum))
    assert bool((merged >= low - 1e-12).all() and (merged <= high + 1e-12).all())


def test_regmean_by_hand():
    first, second = torch.diag(t(1, 3)), torch.diag(t(3, 1))
    ones, fives = torch.ones(1, 2), torch.full((1, 2), 5.0)
    assert regmean([ones, fives], data=[first, second]).tolist()[0] == pytest.approx([4, 2])
    assert regmean([ones, fives], data=[first, second], weights=[3, 1]).tolist()[0] == pytest.approx([3, 1.4])
    assert regmean([ones, fives], data=[first, first]).tolist()[0] == pytest.approx([3, 3])
    assert regmean([ones, fives], data=[torch.zeros(2, 2), second]).tolist()[0] == pytest.approx([5, 5])
    assert regmean([ones, fives], [1, 3]).tolist() == [[4, 4]]
    silent = regmean([ones, fives], [1, 3], data=[torch.diag(t(1, 0)), torch.diag(t(1, 0))])
    assert silent.tolist()[0] == pytest.approx([4, 4])
    assert regmean([ones, fives], data=[first, torch.zeros(2, 2)], weights=[0, 1]).tolist()[0] == pytest.approx([5, 5])


def test_regmean_reaches_the_least_outputs_error():
    (x, y), (a, b) = drawn((30, 6), 2), drawn((4, 6), 2)
    merged = regmean([a, b], data=[x.T @ x, y.T @ y], shrink=1.0)

    def error(w: torch.Tensor) -> float:
        return float((x @ (w - a).T).square().sum() + (y @ (w - b).T).square().sum())

    best = error(merged)
    for step in drawn((4, 6), 8):
        assert error(merged + 1e-3 * step) > best
    assert error(merged) < min(error((a + b) / 2), error(a), error(b))


def test_regmean_shrinks_what_is_off_the_diagonal():
    grams = [x.T @ x for x in drawn((9, 3), 2)]
    a, b = drawn((2, 3), 2)
    diagonal = regmean([a, b], data=grams, shrink=0.0)
    shares = grams[0].diagonal() / (grams[0].diagonal() + grams[1].diagonal())
    torch.testing.assert_close(diagonal, a * shares + b * (1 - shares))
    half = [(g + torch.diag(g.diagonal())) / 2 for g in grams]
    torch.testing.assert_close(
        regmean([a, b], data=grams, shrink=0.5), regmean([a, b], data=half, shrink=1.0), rtol=1e-10, atol=1e-12
    )


def test_regmean_refuses():
    rank_one = torch.ones(2, 2)
    with pytest.raises(ConfigError, match=r"^q: the Gram .* leave the solution open; set shrink below 1 \(it is 1\)"):
        regmean([torch.ones(1, 2), torch.zeros(1, 2)], data=[rank_one, rank_one], shrink=1.0, name="q")
    with pytest.raises(ConfigError, match="1 of 2 models have a Gram matrix"):
        regmean([torch.ones(1, 2)] * 2, data=[rank_one, None])
    with pytest.raises(ConfigError, match="regmean needs weights of 0 or more"):
        regmean([torch.ones(1, 2)] * 2, [2, -1], data=[rank_one, rank_one])


@settings(max_examples=10, deadline=None)
@given(shape=shapes, dtype=dtypes)
def test_regmean_in_pieces(shape, dtype):
    tensors = drawn(shape, 2, dtype)
    data = [x.T @ x for x in drawn((2 * shape[-1], shape[-1]), 2)]
    require_same_bits_in_pieces(regmean, tensors, [1.0, 2.0], data=data)
