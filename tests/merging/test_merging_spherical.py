"""Interpolation on spheres, and model stock: hand-worked numbers and laws."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_checks import drawn, require_same_bits_in_pieces, t

from honeloom.errors import ConfigError
from honeloom.merging.model_stock import model_stock
from honeloom.merging.slerp import nuslerp, slerp
from honeloom.merging.spherical import karcher, multislerp


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_slerp_by_hand():
    assert slerp([t(1, 0), t(0, 2)]).tolist() == pytest.approx([0.5**0.5, 2**0.5], rel=1e-15)
    assert slerp([t(1, 0), t(0, 1)], t=1 / 3).tolist() == pytest.approx([math.cos(math.pi / 6), 0.5])
    assert nuslerp([t(1, 0), t(0, 1)], [2, 1]).tolist() == slerp([t(1, 0), t(0, 1)], t=1 / 3).tolist()


def test_slerp_ends_and_symmetry():
    a, b = drawn((10, 100), 2)
    assert torch.equal(slerp([a, b], t=0), a)
    assert torch.equal(slerp([a, b], t=1), b)
    torch.testing.assert_close(slerp([a, b], t=0.3), slerp([b, a], t=0.7), rtol=1e-13, atol=1e-13)


def test_slerp_keeps_the_length_of_equally_long_vectors():
    a, b = (x / x.norm() for x in drawn((1000,), 2))
    for share in (0.1, 0.5, 0.9):
        middle = slerp([a, b], t=share)
        assert float(middle.norm()) == pytest.approx(1, rel=1e-12)
        angle, part = (math.acos(float(x)) for x in (a @ b, a @ middle))
        assert part == pytest.approx(share * angle, rel=1e-9)


def test_slerp_where_no_arc_is_defined():
    assert slerp([t(1, 2), t(1, 2)]).tolist() == [1, 2]
    assert slerp([t(0, 0), t(2, 4)]).tolist() == [1, 2]
    assert slerp([t(0, 0), t(0, 0)]).tolist() == [0, 0]
    assert slerp([t(1, 0), t(1, 1e-8)]).tolist() == pytest.approx([1, 5e-9])
    assert slerp([torch.zeros(0), torch.zeros(0)]).shape == (0,)
    for bad in (math.nan, math.inf):
        assert math.isnan(float(slerp([t(bad, 1), t(-bad, 1)])[0]))
        assert float(slerp([t(bad, 1), t(-bad, 1)])[1]) == 1, "one entry that is not finite spoils no other"
    with pytest.warns(UserWarning, match=r"^q: 1 of 1 pairs of vectors are opposite; no arc is defined"):
        assert slerp([t(1, 2), t(-1, -2)], name="q").tolist() == [0, 0]


def test_slerp_near_the_fallback_is_continuous():
    for angle in (0.99e-6, 1.01e-6):
        a, b, wanted = (t(math.cos(x), math.sin(x)) for x in (0, angle, 0.3 * angle))
        torch.testing.assert_close(slerp([a, b], t=0.3), wanted, rtol=0, atol=1e-12)


def arc(a, b, share):
    """Slerp of two numpy vectors, by the book."""
    angle = math.acos(a @ b / math.sqrt((a @ a) * (b @ b)))
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 6), (600, 300), (3, 70_000)])
def test_nuslerp_by_rows_and_columns(shape, row_wise, with_base):
    a, b, base = drawn(shape, 3)
    given_base = {"base": base} if with_base else {}
    merged = require_same_bits_in_pieces(
        nuslerp, [a, b], [3, 1], settings={"flatten": False, "row_wise": row_wise}, **given_base
    )
    origin = base.numpy() if with_base else np.zeros(shape)
    axis = -1 if row_wise else 0
    one, other, result = (np.moveaxis(x.numpy() - origin, axis, 0).reshape(shape[axis], -1) for x in (a, b, merged))
    for j in range(0, one.shape[1], max(1, one.shape[1] // 50)):
        np.testing.assert_allclose(result[:, j], arc(one[:, j], other[:, j], 0.25), rtol=1e-9, atol=1e-12)


def test_nuslerp_with_a_base_turns_task_vectors():
    assert nuslerp([t(2, 1), t(1, 3)], base=t(1, 1)).tolist() == pytest.approx([1 + 0.5**0.5, 1 + 2**0.5])
    assert nuslerp([t(1, 0), t(0, 2)]).tolist() == slerp([t(1, 0), t(0, 2)]).tolist()
    with pytest.raises(ConfigError, match="sum to 0"):
        nuslerp([t(1, 0), t(0, 1)], [1, -1])


def test_a_vector_is_one_row_and_one_column():
    a, b = drawn((50,), 2)
    for row_wise in (False, True):
        torch.testing.assert_close(nuslerp([a, b], flatten=False, row_wise=row_wise), nuslerp([a, b]))


def test_nuslerp_of_single_numbers_is_straight():
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        merged = nuslerp([t(1, 2, -1).view(3, 1), t(3, 0, 1).view(3, 1)], flatten=False, row_wise=True)
    assert merged.view(-1).tolist() == [2, 1, 0]


@pytest.mark.parametrize("mean", [multislerp, karcher])
def test_means_of_directions_by_hand(mean):
    a, b = t(1, 0), t(0, 1)
    assert mean([a, b]).tolist() == pytest.approx(slerp([a, b]).tolist())
    assert mean([a, b * 3]).tolist() == pytest.approx([2**0.5, 2**0.5]), "the mean length is 2"
    assert mean(list(torch.eye(3).double())).tolist() == pytest.approx([3**-0.5] * 3)
    assert mean([t(3, 4)] * 3, [1, 2, 5]).tolist() == pytest.approx([3, 4], rel=1e-15)
    assert mean([t(3, 4)]).tolist() == [3, 4]
    assert mean([t(0, 0), t(3, 4)]).tolist() == pytest.approx([1.5, 2]), "a zero tensor has no direction"
    assert mean([t(0, 0), t(0, 0)]).tolist() == [0, 0]
    with pytest.raises(ConfigError, match="sum to 0"):
        mean([a, b], [1, -1])
    assert math.isnan(float(mean([t(math.nan, 1), b])[0]))
    assert float(mean([t(math.nan, 1), t(0, 1)])[1]) == 1


@pytest.mark.parametrize("mean", [multislerp, karcher])
@pytest.mark.parametrize(
    "tensors", [[t(1, 2), t(-1, -2)], [t(1, 0), t(-0.5, 0.75**0.5), t(-0.5, -(0.75**0.5))]], ids=["two", "three"]
)
def test_directions_that_cancel_are_averaged(mean, tensors):
    with pytest.warns(UserWarning, match=r"^q: the directions of the models cancel, none is their mean"):
        assert mean(tensors, name="q").tolist() == pytest.approx([0, 0], abs=1e-15)


def test_one_number_of_two_signs_is_averaged():
    with pytest.warns(UserWarning, match="cancel"):
        assert karcher([t(1), t(-3)]).tolist() == [-1]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 30), st.booleans(), st.data())
def test_multislerp_is_the_published_procedure(models, size, normalize, data):
    """Mean, residuals in its tangent space, their mean, back by the exponential map, times the mean length."""
    vectors = [x.numpy() + 0.5 for x in drawn((size,), models)]
    weights = np.array(data.draw(st.lists(st.floats(0.1, 3), min_size=models, max_size=models)))
    shares = weights / weights.sum() if normalize else weights
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = sum(w * u for w, u in zip(shares, units, strict=True))
    mean /= np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(shares, units, strict=True))
    length = np.linalg.norm(tangent) + 1e-300
    there = mean * math.cos(length) + tangent * math.sin(length) / length
    wanted = there * sum(w * np.linalg.norm(v) for w, v in zip(shares, vectors, strict=True))
    merged = multislerp([torch.from_numpy(v) for v in vectors], weights.tolist(), normalize=normalize)
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_multislerp_with_a_base_and_a_shortest_length():
    base, a, b = t(1, 1), t(2, 1), t(1, 2)
    assert multislerp([a, b], base=base).tolist() == pytest.approx([1 + 0.5**0.5] * 2)
    assert multislerp([t(1, 0), t(0, 1e-3)], eps=1e-2).tolist() == pytest.approx([0.5, 0]), "b is too short to count"
    with pytest.warns(UserWarning, match="cancel"):
        assert multislerp([a, t(0, 1)], base=base).tolist() == [1, 1]


def log_map(centre, unit):
    cosine = float(np.clip(centre @ unit, -1, 1))
    across = unit - cosine * centre
    return math.acos(cosine) * across / max(np.linalg.norm(across), 1e-300)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 40), st.data())
def test_the_karcher_mean_has_no_residual(models, size, data):
    weights = data.draw(st.lists(st.floats(0.2, 3), min_size=models, max_size=models))
    vectors = [x + 1.0 for x in drawn((size,), models)]
    merged = karcher(vectors, weights, max_iter=200, tol=1e-13).numpy()
    centre = merged / np.linalg.norm(merged)
    units = [(v / v.norm()).numpy() for v in vectors]
    residual = sum(w * log_map(centre, u) for w, u in zip(weights, units, strict=True)) / sum(weights)
    assert np.linalg.norm(residual) < 1e-7
    length = sum(w * float(v.norm()) for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    assert np.linalg.norm(merged) == pytest.approx(length)


def test_the_karcher_mean_of_two_is_slerp_and_of_any_order_the_same():
    a, b, c = drawn((50,), 3)
    a, b = a / a.norm(), b / b.norm()
    torch.testing.assert_close(karcher([a, b], [3, 1], tol=1e-12, max_iter=99), slerp([a, b], t=0.25))
    for order in itertools.permutations([a, b, c]):
        torch.testing.assert_close(karcher(list(order)), karcher([a, b, c]), rtol=1e-12, atol=1e-13)


def test_karcher_says_that_it_did_not_end():
    with pytest.warns(UserWarning, match=r"q: the last of 1 steps was 0\.\d+ long, tol is 1e-09; raise max_iter"):
        karcher([t(1, 0), t(0, 1)], [5, 1], max_iter=1, tol=1e-9, name="q")


def test_model_stock_by_hand():
    half = 3**0.5 / 2
    zero = t(0, 0)
    assert model_stock([t(1, 0), t(0, 1)], base=zero).tolist() == [0, 0]
    assert model_stock([t(1, 0), t(1, 0)], base=zero).tolist() == [1, 0]
    assert model_stock([t(1, 0), t(0.5, half)], base=zero).tolist() == pytest.approx([0.5, half / 3])
    assert model_stock([t(1, 0), t(-1, 0.5)], base=zero).tolist() == [0, 0], "a negative cosine gives the base"
    assert model_stock([t(1, 0), t(0, 0)], base=zero).tolist() == [0, 0]
    assert model_stock([t(2, 3), t(2, 3)], base=t(2, 3)).tolist() == [2, 3]
    # cosines 1, 0.5 and 0.5: c = 2/3, t = 2 / (1 + 4/3) = 6/7
    merged = model_stock([t(1, 0), t(1, 0), t(0.5, half)], base=zero)
    assert merged.tolist() == pytest.approx([6 / 7 * 2.5 / 3, 6 / 7 * half / 3])


def test_model_stock_by_rows():
    a, b = torch.tensor([[1.0, 0], [1, 0], [0, 0]]), torch.tensor([[0.0, 1], [1, 0], [5, 5]])
    merged = model_stock([a, b], base=torch.zeros(3, 2), filter_wise=True)
    assert merged.tolist() == [[0, 0], [1, 0], [0, 0]]
    x, y, base = drawn((300, 450), 3)
    merged = require_same_bits_in_pieces(model_stock, [x, y + x, x], base=base, settings={"filter_wise": True})
    for i in range(0, 300, 23):
        row = model_stock([x[i], (y + x)[i], x[i]], base=base[i])
        torch.testing.assert_close(merged[i], row, rtol=1e-12, atol=1e-14)
    vector = [v[0] for v in (x, y + x, x)]
    torch.testing.assert_close(
        model_stock(vector, base=base[0], filter_wise=True), model_stock(vector, base=base[0]), rtol=1e-12, atol=1e-14
    )
