"""The three rules on hand-worked numbers, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.errors import ConfigError
from honeloom.merging.linear import linear
from honeloom.merging.recompute import last_place_error
from honeloom.merging.slerp import slerp, slerp_weights
from honeloom.merging.task_arithmetic import task_arithmetic
from honeloom.ops.noise import normal
from honeloom.ops.rounding import round_once


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_linear_by_hand():
    assert linear([t(1, 2), t(3, 6)], [1, 3]).tolist() == [2.5, 5]
    assert linear([t(1, 2), t(3, 6)], [1, 3], normalize=False).tolist() == [10, 20]
    assert linear([t(1, 2), t(3, 6)], [1, 1]).dtype == torch.float64
    assert linear([t(3, 6)], [0.7]).tolist() == pytest.approx([3, 6])


def test_linear_refuses_what_has_no_answer():
    with pytest.raises(ConfigError, match="sum to 0"):
        linear([t(1), t(2)], [1, -1])
    with pytest.raises(ValueError, match="one weight per tensor"):
        linear([t(1), t(2)], [1])
    with pytest.raises(ValueError, match="0 tensors"):
        linear([], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_average_of_equals_is_bit_exact(dtype):
    x = normal(0, "x", 4096).to(dtype)
    assert torch.equal(linear([x, x, x], [1 / 3] * 3).to(dtype), x)


def test_task_arithmetic_by_hand():
    assert task_arithmetic(t(1, 1), [t(2, 1), t(1, 3)], [0.5, 0.25], scale=2).tolist() == [2, 2]
    assert task_arithmetic(t(0, 0), [t(2, 4), t(4, 8)], [1, 3], normalize=True).tolist() == [3.5, 7]
    with pytest.raises(ConfigError, match="sum to 0"):
        task_arithmetic(t(1), [t(1), t(2)], [1, -1], normalize=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_task_arithmetic_ends(dtype):
    base, tuned = normal(0, "b", 4096).to(dtype), normal(0, "t", 4096).to(dtype)
    assert torch.equal(task_arithmetic(base, [tuned], [1], scale=0).to(dtype), base)
    assert torch.equal(task_arithmetic(base, [tuned], [1]).to(dtype), tuned)


def test_slerp_by_hand():
    torch.testing.assert_close(slerp(t(1, 0), t(0, 2)), torch.tensor([0.5**0.5, 2**0.5]).double(), rtol=1e-7, atol=0)
    third = slerp(t(1, 0), t(0, 1), t=1 / 3).tolist()
    assert third == pytest.approx([math.cos(math.pi / 6), 0.5])


def test_slerp_ends_and_symmetry():
    a, b = normal(0, "a", 1000).view(10, 100), normal(0, "b", 1000).view(10, 100)
    assert torch.equal(slerp(a, b, t=0), a.double())
    assert torch.equal(slerp(a, b, t=1), b.double())
    assert slerp(a, b, t=0.3).shape == (10, 100)
    torch.testing.assert_close(slerp(a, b, t=0.3), slerp(b, a, t=0.7), rtol=1e-13, atol=1e-13)


def test_slerp_keeps_the_length_of_equally_long_vectors():
    a, b = normal(0, "a", 1000).double(), normal(0, "b", 1000).double()
    a, b = a / a.norm(), b / b.norm()
    for share in (0.1, 0.5, 0.9):
        middle = slerp(a, b, t=share)
        assert float(middle.norm()) == pytest.approx(1, rel=1e-12)
        angle, part = (math.acos(float(x)) for x in (a @ b, a @ middle))
        assert part == pytest.approx(share * angle, rel=1e-9)


def test_slerp_where_no_arc_is_defined():
    assert slerp(t(1, 2), t(1, 2)).tolist() == [1, 2]
    assert slerp(t(0, 0), t(2, 4)).tolist() == [1, 2]
    assert slerp(t(1, 2), t(-1, -2)).tolist() == [0, 0]
    assert slerp(t(1, 0), t(1, 1e-8)).tolist() == pytest.approx([1, 5e-9])
    assert slerp(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert math.isnan(float(slerp(t(math.nan), t(1.0))))


def test_slerp_near_the_fallback_is_continuous():
    a, other = t(1, 0).double(), lambda angle: torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    for angle in (0.99e-6, 1.01e-6):
        wanted = other(0.3 * angle)
        torch.testing.assert_close(slerp(a, other(angle), t=0.3), wanted, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200_000), st.floats(0, 1))
def test_slerp_weights_satisfy_the_sine_rule(count, share):
    a, b = normal(0, "a", count).double(), normal(0, "b", count).double()
    one, two = slerp_weights(lambda i, j: a[i:j], lambda i, j: b[i:j], count, t=share)
    cosine = float(a @ b / (a.norm() * b.norm()))
    if abs(cosine) < 1 - 1e-9:
        assert one**2 + two**2 + 2 * one * two * cosine == pytest.approx(1, rel=1e-6)


def test_threads_do_not_change_a_bit():
    a, b = normal(0, "a", 300_000), normal(0, "b", 300_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((slerp(a, b, t=0.4), linear([a, b], [0.3, 0.7]), task_arithmetic(a, [b], [0.4])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_inputs_stay_as_they_are():
    a, b = t(1, 2), t(3, 4)
    linear([a, b], [1, 2])
    task_arithmetic(a, [b], [1], scale=2)
    slerp(a, b)
    assert (a.tolist(), b.tolist()) == ([1, 2], [3, 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_last_place_error_measures_rounding(dtype):
    exact = normal(0, "e", 10_000, dtype=torch.float64).numpy()
    rounded = round_once(torch.from_numpy(exact), dtype)
    error = last_place_error(rounded, exact, abs(exact))
    assert 0.4 < error <= 0.5
    off = (
        torch.nextafter(rounded.float(), torch.full_like(rounded, 9).float())
        if dtype == torch.float32
        else rounded * 1.02
    )
    assert last_place_error(off.to(dtype), exact, abs(exact)) > 0.5
    damaged = rounded.clone()
    damaged[3] = math.nan
    assert last_place_error(damaged, exact, abs(exact)) == math.inf
