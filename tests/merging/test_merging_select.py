"""Exact selection: a sort is the oracle, and the number of passes is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.errors import ConfigError
from honeloom.merging.engine import select, select_kernels
from honeloom.merging.engine.operands import float64_operands
from honeloom.merging.engine.select import BINS, FIRST, SHIFT, largest, largest_each, order_statistics
from honeloom.merging.engine.tensors import BLOCK, Cut, Tensors

F64 = torch.float64


class Reads:
    """Elements in memory, and how many were asked for."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.asked = values, 0

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        self.asked += stop - start
        return self.values[start:stop].double()


def sorted_cut(values: torch.Tensor, k: int) -> Cut:
    """By a stable sort of the sizes; NaN is above all."""
    if k <= 0 or k >= len(values):
        return Cut(math.inf if k <= 0 else -1.0)
    sizes = values.double().abs()
    order = sorted(range(len(sizes)), key=lambda i: -math.inf if math.isnan(sizes[i]) else -float(sizes[i]))
    order.sort(key=lambda i: not math.isnan(sizes[i]))
    last = order[k - 1]
    return Cut(math.inf) if math.isnan(sizes[last]) else Cut(float(sizes[last]), last)


def test_by_hand():
    values = torch.tensor([4.0, -3, 2, -1, 3, 0])
    assert largest(Reads(values), 6, 1) == Cut(4.0, 0)
    assert largest(Reads(values), 6, 2) == Cut(3.0, 1) and largest(Reads(values), 6, 3) == Cut(3.0, 4)
    assert largest(Reads(values), 6, 5) == Cut(1.0, 3)
    assert [largest(Reads(values), 6, k) for k in (-1, 0, 6, 7)] == [Cut(math.inf), Cut(math.inf), Cut(-1.0), Cut(-1.0)]
    assert largest(Reads(torch.zeros(0)), 0, 0) == Cut(math.inf)
    assert Cut(3.0, 1)(values.abs(), 0).tolist() == [True, True, False, False, False, False]


NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, math.inf, -math.inf, math.nan, 5e-324, 2.0**-64, -(2.0**-65), 2.0**64]),
    st.floats(),
    st.floats(0.99, 1.01),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=50), st.integers(-1, 51), st.sampled_from([0, 3, 1 << 18]))
def test_any_numbers_are_chosen_as_a_sort_does(values, k, room):
    """Whether entries are collected or counted again by finer bins."""
    values = torch.tensor(values, dtype=F64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_ROOM", room)
        cut = largest(Reads(values), len(values), k)
    assert cut == sorted_cut(values, k)
    chosen, damaged = cut(values.abs(), 0), int(values.isnan().sum())
    assert int(chosen.sum()) == max(min(k, len(values)), damaged, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=50), st.sampled_from([0, 1 << 18]))
def test_order_statistics_are_those_of_a_sort(values, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_ROOM", room)
        got = order_statistics(Reads(torch.tensor(values, dtype=F64)), len(values), [*range(len(values)), 0])
    assert got == [*sorted(values), min(values)]


def test_order_statistics_count_nan_as_largest_and_refuse_the_rest():
    values = torch.tensor([math.nan, 2.0, math.inf, 1.0])
    got = order_statistics(Reads(values), 4, [0, 1, 2, 3])
    assert got[:3] == [1.0, 2.0, math.inf] and math.isnan(got[3])
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} of 4"):
            order_statistics(Reads(values), 4, [rank])
    with pytest.raises(ValueError, match="below 0"):
        order_statistics(Reads(-values), 4, [0])


def bins_of(values: np.ndarray) -> np.ndarray:
    """The first pass in plain numpy."""
    bits = np.abs(values).view(np.int64)
    bins = np.clip(((bits - FIRST) >> SHIFT) + 2, 1, BINS - 1)
    return np.where(bits == 0, 0, bins)


def test_the_first_histogram_is_that_of_numpy():
    rng = np.random.default_rng(0)
    values = np.concatenate([
        rng.normal(0, 1, 70_001), np.ldexp(rng.normal(0, 1, 20_000), rng.integers(-1074, 1023, 20_000)),
        np.zeros(500), [-0.0, np.inf, -np.inf, np.nan, 5e-324, 2.0**-64, np.nextafter(2.0**-64, 0), 2.0**63.9, 2.0**64],
    ])  # fmt: skip
    counts, zeros = np.zeros((1, 4, BINS), np.uint32), np.zeros(1, np.int64)
    select_kernels.histograms(*float64_operands(torch.from_numpy(values)).arguments, counts, zeros)
    wanted = np.bincount(bins_of(values), minlength=BINS)
    got = counts[0].sum(axis=0, dtype=np.int64)
    assert zeros[0] == wanted[0] and got[0] == 0
    assert got[1] == wanted[1] + wanted[0] and np.array_equal(got[2:], wanted[2:])
    for at in np.unique(bins_of(values)):
        low, high = select._bin_ends(int(at))
        inside = np.abs(values).view(np.int64)[bins_of(values) == at]
        assert low <= inside.min() and inside.max() <= high


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (lambda g, n: torch.randn(n, generator=g, dtype=F64), 2),
        (
            lambda g, n: (
                torch.randn(n, generator=g).bfloat16().double() - torch.randn(n, generator=g).bfloat16().double()
            ),
            2,
        ),
        (lambda g, n: torch.where(torch.rand(n, generator=g) < 0.9, 0.0, torch.randn(n, generator=g)).double(), 2),
        (lambda g, n: torch.ones(n, dtype=F64), 3),
        (lambda g, n: 1 + torch.rand(n, generator=g, dtype=F64) * 2.0**-30, 4),
    ],
    ids=["normal", "bfloat16", "mostly zero", "all equal", "one bin"],
)
def test_a_long_tensor_takes_few_passes(make, passes):
    count = 5 * BLOCK + 321
    values = make(torch.Generator().manual_seed(0), count)
    order = torch.sort(values.abs(), descending=True, stable=True)
    for k in (1, count // 5, count // 2, count - 1):
        reads = Reads(values)
        assert largest(reads, count, k) == Cut(float(order.values[k - 1]), int(order.indices[k - 1]))
        assert reads.asked <= passes * count
        chosen = largest(reads, count, k)(values.abs(), 0)
        assert int(chosen.sum()) == k


def stored_tensors(models, base, dtype, name):
    def raw(start, stop):
        data = [t.to(dtype)[start:stop].view(torch.uint8).numpy() for t in (base, *models)]
        return data[0], data[1:], name, [name] * len(models)

    reads = [Reads(t.to(dtype)) for t in (base, *models)]
    common = ("x", (len(base),), tuple(reads[1:]), (1.0,) * len(models), reads[0])
    return Tensors(*common), Tensors(*common, raw=raw)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_many_models_share_the_passes(dtype, name):
    count = 3 * BLOCK + 5
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(count, generator=generator) for _ in range(4))
    ks = [(count // 2, count // 100), (), (0, count, 1, count - 1, 1)]
    read, stored = stored_tensors(models, base, dtype, name)
    cuts = largest_each(read, ks)
    assert cuts == largest_each(stored, ks)
    assert read.base.asked == 2 * count  # of both together: the stored one reads nothing
    for model, chosen, wanted in zip(models, cuts, ks, strict=True):
        order = torch.sort((model.to(dtype).double() - base.to(dtype).double()).abs(), descending=True, stable=True)
        for cut, k in zip(chosen, wanted, strict=True):
            if 0 < k < count:
                assert cut == Cut(float(order.values[k - 1]), int(order.indices[k - 1]))
    assert cuts[2][0] == Cut(math.inf) and cuts[2][1] == Cut(-1.0) and cuts[2][2] == cuts[2][4]


def test_several_models_need_a_base():
    with pytest.raises(ConfigError, match="base_model"):
        largest_each(Tensors("x", (2,), (Reads(torch.ones(2)),), (1.0,)), [[1]])


def test_known_cuts_are_not_looked_for_again():
    """Of the same task vectors in another merge; what is kept is bounded."""
    generator = torch.Generator().manual_seed(0)
    read = [Reads(torch.randn(3000, generator=generator)) for _ in range(3)]
    cuts: tuple[dict[int, Cut], ...] = ({}, {})
    tensors = Tensors("x", (3000,), (read[0], read[1]), (1.0, 1.0), read[2], cuts=cuts)
    plain = Tensors("x", (3000,), (read[0], read[1]), (1.0, 1.0), read[2])
    first = largest_each(tensors, [(10, 0), (20, 3000)])
    assert first == largest_each(plain, [(10, 0), (20, 3000)])
    assert cuts[0][10] == first[0][0] and cuts[1][20] == first[1][0]
    for model in read:
        model.asked = 0
    assert largest_each(tensors, [(10, 0), (20,)]) == (first[0], first[1][:1])
    assert [model.asked for model in read] == [0, 0, 0]
    assert largest_each(tensors, [(10, 30), (20,)]) == largest_each(plain, [(10, 30), (20,)])
    assert read[0].asked > 0
    for k in range(1, 60):
        assert largest_each(tensors, [(k,), (k,)]) == largest_each(plain, [(k,), (k,)])
    assert all(len(known) <= 16 and 59 in known for known in cuts)
