"""Compiled merging: to the bit what plain torch gives, on numbers of every kind and in pieces of every length."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.errors import ConfigError
from honeloom.merging.engine import row_kernels
from honeloom.merging.engine.chunks import merge_chunk
from honeloom.merging.engine.gram import gram, gram_block
from honeloom.merging.engine.operands import KINDS, operands
from honeloom.merging.engine.select import largest
from honeloom.merging.engine.sparse import elect_and_combine
from honeloom.merging.engine.tensors import BLOCK, Cut, Kept, SparseSum, Tensors, WeightedSum, blocks
from honeloom.ops.noise import bernoulli, uniform
from honeloom.ops.rounding import round_once

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {
    BF16: "BF16", F16: "F16", F32: "F32", F64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
OUTPUTS = (BF16, F16, F32, F64)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def tensors_of(models, base=None, *, raw=True, weights=None, seed=3, unstored=()) -> Tensors:
    """Tensors in memory, readable as float64 and, unless told otherwise, as stored bytes."""

    def read(tensor):
        return lambda start, stop: tensor[start:stop].double()

    def stored(start, stop):
        def cut(k, tensor):
            return None if tensor is None or k in unstored else tensor[start:stop].view(torch.uint8).numpy()

        names = [None if t is None else NAMES[t.dtype] for t in (base, *models)]
        data = [cut(k, t) for k, t in enumerate((base, *models))]
        return data[0], data[1:], names[0], names[1:]

    return Tensors(
        "x", (len(models[0]),), tuple(map(read, models)), tuple(weights or (1.0,) * len(models)),
        None if base is None else read(base), (), seed, stored if raw else None,
    )  # fmt: skip


def random_models(count, dtypes, *, seed=0, spread=0.1):
    """Models near a base; many distances are equal, and some are 0."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator)
    steps = [torch.randn(count, generator=generator).mul(8).round().div(8) for _ in dtypes[1:]]
    return [base.to(dtypes[0]), *((base + spread * step).to(d) for step, d in zip(steps, dtypes[1:], strict=True))]


def assert_same_chunk(plan, tensors, dtype, start, stop):
    """The kernel's result is that of the plan's own torch call, rounded once."""
    chunk = merge_chunk(plan, tensors, start, stop, dtype)
    exact = plan(start, stop)
    assert torch.equal(bits(chunk.values), bits(round_once(exact, dtype)))
    if tensors.base is not None:
        origin = tensors.base(start, stop)
        assert chunk.lost == int(((exact != origin) & (chunk.values == round_once(origin, dtype))).sum())
    else:
        assert chunk.lost == 0
    assert chunk.damaged is None and chunk.beyond is None
    plain = merge_chunk(lambda a, b: plan(a, b), tensors, start, stop, dtype)
    assert torch.equal(bits(plain.values), bits(chunk.values)) and plain.lost == chunk.lost


def decoded(tensor):
    row = np.empty(len(tensor))
    row_kernels.decode(row, np.ascontiguousarray(tensor.view(torch.uint8).numpy()), KINDS[NAMES[tensor.dtype]])
    return torch.from_numpy(row)


def encoded(values, dtype):
    """Row by row, as the kernels do: rows without subnormal numbers go another way."""
    out = torch.empty(len(values), dtype=dtype)
    for a, b in blocks(len(values), row_kernels.ROW):
        row_kernels.encode(out[a:b].view(torch.uint8).numpy(), values[a:b].numpy(), KINDS[NAMES[dtype]])
    return out


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_every_stored_number_is_decoded_exactly(dtype):
    if dtype.itemsize <= 2:
        kind = torch.uint8 if dtype.itemsize == 1 else torch.int16
        every = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).to(kind).view(dtype)
    else:
        kind = torch.int32 if dtype == F32 else torch.int64
        every = torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, (100_000,), dtype=kind).view(dtype)
    wanted, got = every.double(), decoded(every)
    number = ~wanted.isnan()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(bits(got)[number], bits(wanted)[number])


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_every_number_and_every_tie_is_encoded_as_round_once_does(dtype):
    """Each 16-bit number, the middle to the next one, and numbers just beside it, by their size."""
    kind = F16 if dtype == F16 else BF16
    every = torch.arange(1 << 15, dtype=torch.int16).view(kind).double()
    every = every[every.isfinite()]
    middle = ((every[1:] + every[:-1]) / 2).view(torch.int64)
    beside = [(middle + step).view(F64) for step in (-1, 0, 1, 1 << 31, (1 << 32) - 1, 1 << 32, -(1 << 32))]
    step = float(every[-1] - every[-2])
    beyond = [float(every[-1]) + step * f for f in (0.25, 0.5, 0.5000001, 0.75, 1, 2)]
    special = torch.tensor([*beyond, math.inf, 1e308, 5e-324, 2.0**-1022], dtype=F64)
    values = torch.cat([every, *beside, special]).sort().values
    values = torch.stack([values, -values]).T.reshape(-1)
    assert torch.equal(bits(encoded(values, dtype)), bits(round_once(values, dtype)))


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
@settings(max_examples=150, deadline=None)
@given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=70))
def test_any_float64_is_encoded_as_round_once_does(dtype, values):
    values = torch.tensor(values, dtype=F64)
    assert torch.equal(bits(encoded(values, dtype)), bits(round_once(values, dtype)))


@pytest.mark.parametrize(("dtype", "quiet"), [(BF16, 0x7FC0), (F16, 0x7E00), (F32, 0x7FC00000), (F64, 0x7FF8 << 48)])
@pytest.mark.parametrize("nan", [-1, (1 << 63) - 1, 0x7FF0000000000001, -0x7FFFFFFFFFFFF, 0x7FF8000000000000])
@pytest.mark.parametrize("beside", [1.0, 1e-39])
def test_every_nan_is_written_alike(dtype, quiet, nan, beside):
    values = torch.tensor([beside, 0.0, beside], dtype=F64)
    values.view(torch.int64)[1] = nan
    assert bits(encoded(values, dtype)).tolist()[1] == quiet
    tensors = tensors_of([values, values])
    for merged in (WeightedSum(tensors, (1.0, 1.0)), lambda start, stop: values[start:stop]):
        chunk = merge_chunk(merged, tensors, 0, 3, dtype)
        assert bits(chunk.values).tolist()[1] == quiet and chunk.beyond == 1
        assert bool(chunk.values[::2].isfinite().all())


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_the_first_damaged_element_is_found(dtype):
    data = torch.ones(2500).to(dtype)
    where = data.view(torch.uint8).numpy()
    ask = lambda: row_kernels.first_not_finite(2500, where.ctypes.data, KINDS[NAMES[dtype]])  # noqa: E731
    assert ask() == -1
    for place in (2499, 1024, 1023, 0):
        data[place] = math.nan
        assert ask() == place
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        data[:] = 1.0
        data[1500] = -math.inf
        assert ask() == 1500


def test_weighted_sums_by_hand():
    """Golden 1 and 2 of the field: linear, and a task vector from a base."""
    tensors = tensors_of([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])])
    assert merge_chunk(WeightedSum(tensors, (0.25, 0.75)), tensors, 0, 2, F32).values.tolist() == [2.5, 5.0]
    models = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])]
    tensors = tensors_of(models, torch.tensor([1.0, 1.0]))
    assert merge_chunk(WeightedSum(tensors, (1.0, 0.5), True), tensors, 0, 2, BF16).values.tolist() == [2.0, 2.0]


MIXTURES = [
    (BF16, BF16, BF16), (F32, BF16, F16, F64), (F16, F16), (BF16, F32, torch.float8_e4m3fn, torch.float8_e5m2),
]  # fmt: skip


@pytest.mark.parametrize("out", OUTPUTS, ids=str)
@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
def test_weighted_sum_has_the_bits_of_torch(dtypes, out):
    base, *models = random_models(2500, dtypes)
    factors = (0.1, -0.7, 1 / 3)[: len(models)]
    for origin, from_base in [(None, False), (base, False), (base, True)]:
        for raw in (True, False):
            tensors = tensors_of(models, origin, raw=raw)
            for start, stop in [(0, 2500), (1, 1), (7, 1031), (2499, 2500)]:
                assert_same_chunk(WeightedSum(tensors, factors, from_base), tensors, out, start, stop)


def assert_same_in_place(plan, tensors, dtype, held, start, stop):
    """Written where it will be used, uncounted: the rounded numbers as another type, or as themselves."""
    out = torch.full((stop - start,), 7.0).to(held)
    chunk = merge_chunk(plan, tensors, start, stop, dtype, out, counted=False)
    assert chunk.values.data_ptr() == out.data_ptr() and chunk.lost == 0
    assert torch.equal(bits(out), bits(round_once(plan(start, stop), dtype).to(held)))
    return chunk


FACTORS = [
    (0.31234567, 0.68), (0.5, 0.5), (0.3, 0.7), (1.0, -1.0), (1.0, 0.0), (0.0, -0.0), (1e-30, 3e9), (1.0,), (-0.75,),
    (0.2, 0.3, -0.5), (0.1, 0.2, 0.3, 0.4), (0.9, -0.8, 0.7, -0.6, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-122, 2.0**-130, 2.0**125], ids=["one", "small", "subnormal", "large"])
def test_sums_of_bfloat16_have_the_bits_of_torch(factors, scale):
    """Sums near the middle of two numbers, that cancel, or that are beyond the range of normal numbers."""
    base, *models = random_models(9001, (BF16,) * (len(factors) + 1))
    base, *models = ((t.double() * scale).to(BF16) for t in (base, *models))
    models[0][::7] = base[::7] = 0.0
    for from_base in (False, True):
        tensors = tensors_of(models, base if from_base else None)
        plan = WeightedSum(tensors, factors, from_base)
        for start, stop in [(0, 9001), (5, 5), (13, 4109)]:
            exact = round_once(plan(start, stop), BF16)
            if bool(exact.isfinite().all()):
                for held in (BF16, F32):
                    assert_same_in_place(plan, tensors, BF16, held, start, stop)
            else:
                assert scale > 1
                out = torch.empty(stop - start)
                chunk = merge_chunk(plan, tensors, start, stop, BF16, out, counted=False)
                wrong = ~exact.isfinite()
                assert chunk.damaged is None and chunk.beyond == start + int(wrong.nonzero()[0])
                assert torch.equal(bits(out), bits(exact.float()))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bfloat16_are_summed_as_in_torch(data):
    """Any bits, infinity and NaN among them, and any weights."""
    models, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    words = st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=size, max_size=size)
    read = [torch.tensor(data.draw(words), dtype=torch.int16).view(BF16) for _ in range(models + 1)]
    factors = tuple(data.draw(st.floats(allow_nan=False, allow_infinity=False, width=64)) for _ in range(models))
    from_base = data.draw(st.booleans())
    tensors = tensors_of(read[1:], read[0] if from_base else None)
    plan = WeightedSum(tensors, factors, from_base)
    exact = round_once(plan(0, size), BF16)
    for held in (BF16, F32):
        chunk = merge_chunk(plan, tensors, 0, size, BF16, torch.empty(size, dtype=held), counted=False)
        assert torch.equal(chunk.values.isnan(), exact.isnan())
        number = ~exact.isnan()
        assert torch.equal(bits(chunk.values)[number], bits(exact.to(held))[number])
        first = (~exact.isfinite()).nonzero()
        assert chunk.beyond == (int(first[0]) if len(first) else None)
        used = enumerate(read[1:] if not from_base else read)  # of one place the base is told, which is read first
        damage = [(int(w[0]), k) for k, t in used if len(w := (~t.isfinite()).nonzero())]
        place, told = min(damage, default=(0, -1))
        assert chunk.damaged == (((told - 1) % (models + 1) if from_base else told, place) if damage else None)


def test_near_the_middle_of_two_numbers_float64_decides():
    """Sums that differ from a middle by less than float32 can tell, among many that do not."""
    one = torch.full((20_000,), 1.0).to(BF16)
    other = torch.full((20_000,), 1.0).to(BF16)
    other[::401] = 1.0 + 2.0**-7
    for step in (-(2.0**-30), 0.0, 2.0**-30):
        factors = (0.5 - step, 0.5 + step)
        tensors = tensors_of([one, other])
        plan = WeightedSum(tensors, factors)
        assert_same_in_place(plan, tensors, BF16, F32, 0, 20_000)
        expected = 1.0 + 2.0**-7 if step > 0 else 1.0
        assert merge_chunk(plan, tensors, 0, 2, BF16, torch.empty(2), counted=False).values[0] == expected


@pytest.mark.parametrize("held", OUTPUTS, ids=str)
@pytest.mark.parametrize("out", OUTPUTS, ids=str)
def test_any_result_can_be_held_as_any_type(out, held):
    base, *models = random_models(2500, (BF16, F32, F16))
    tensors = tensors_of(models, base)
    kept = tuple(kept_of(models, base, 0.5))
    sparse = SparseSum(tensors, kept, (0.7, 0.4), elect=True, normalize=True)
    sums = WeightedSum(tensors, (0.7, 0.4), True)
    for plan in (sums, sparse, lambda a, b: sums(a, b)):
        assert_same_in_place(plan, tensors, out, held, 3, 2400)


def test_the_base_itself_is_a_sum_of_no_models():
    base = torch.linspace(-1, 1, 3000).to(BF16)
    tensors = dataclasses.replace(tensors_of([base], base), models=(), weights=())
    tensors = dataclasses.replace(tensors, raw=lambda a, b: (base[a:b].view(torch.uint8).numpy(), [], "BF16", []))
    out = torch.empty(3000)
    merge_chunk(WeightedSum(tensors, (), True), tensors, 0, 3000, BF16, out, counted=False)
    assert torch.equal(out, base.float())


def test_what_rounding_loses_is_counted():
    """A step of 1/8 of a place is lost, one of a whole place is not, and an unchanged number is not counted."""
    base = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    model = torch.tensor([1.0 + 2**-10, 1.0 + 2**-7, 1.0, -1e-45, 1.0 - 2**-12])
    tensors = tensors_of([model], base)
    chunk = merge_chunk(WeightedSum(tensors, (1.0,)), tensors, 0, 5, BF16)
    assert chunk.values.tolist() == [1.0, 1.0 + 2**-7, 1.0, -0.0, 1.0] and chunk.lost == 3
    assert merge_chunk(WeightedSum(tensors, (1.0,)), tensors, 0, 5, F32).lost == 0


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_what_is_not_finite_is_never_lost_unless_it_was_finite(dtype):
    """Infinity that stays is no change, NaN is no rounding, and a number that becomes the base's infinity is one."""
    base = torch.tensor([math.inf, math.nan, -math.inf, math.inf, 0.0], dtype=F64)
    model = torch.tensor([math.inf, math.nan, math.inf, 1.7e308, math.nan], dtype=F64)
    tensors = tensors_of([model], base)
    for plan in (WeightedSum(tensors, (1.0,)), lambda start, stop: model[start:stop]):
        chunk = merge_chunk(plan, tensors, 0, 5, dtype)
        assert chunk.lost == (0 if dtype == F64 else 1) and chunk.beyond == 0


def kept_of(models, base, density, **settings):
    """The largest entries of each."""
    k = round(density * len(base))
    deltas = [m.double() - base.double() for m in models]
    return [Kept(low=largest(lambda a, b, d=d: d[a:b], len(d), k), **settings) for d in deltas]


PLANS = {
    "ties": {"elect": True, "normalize": True, "scale": 0.7},
    "sum": {"elect": True, "scale": 1.3},
    "linear": {"total": 3.0},
    "plain": {},
}


@pytest.mark.parametrize("out", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
def test_sparse_sum_has_the_bits_of_torch(dtypes, name, out):
    base, *models = random_models(3000, dtypes)
    weights = (0.6, 1.1, -0.3)[: len(models)]
    kept = [dataclasses.replace(k, factor=1.7) for k in kept_of(models, base, 0.6)]
    kept[0] = Kept(low=kept[0].low, high=Cut(kept[0].low.value * 1.5, 2000), probability=0.8, stream="a", factor=1.25)
    kept[-1] = dataclasses.replace(kept[-1], probability=0.3, stream="b")
    tensors = tensors_of(models, base)
    plan = SparseSum(tensors, tuple(kept), weights, **PLANS[name])
    for start, stop in [(0, 3000), (1, 1), (3, 1500), (1024, 2049), (2999, 3000)]:
        assert_same_chunk(plan, tensors, out, start, stop)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cuts_choose_the_same_entries(data):
    """Sizes of few values, so that there are ties, with two cuts anywhere, and pieces that begin anywhere."""
    size = data.draw(st.integers(1, 60))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0])
    model = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size)))
    values, places = st.sampled_from([-1.0, 0.0, 1.0, 1.5, 2.0, 3.0, math.inf]), st.integers(-1, size)
    cuts = st.none() | st.builds(lambda v, p: Cut(v, -1 if v < 0 else p), values, places)
    kept = Kept(data.draw(cuts), data.draw(cuts), data.draw(st.sampled_from([0.0, 0.5, 1.0])), "s")
    tensors = tensors_of([model], torch.zeros(size))
    start = data.draw(st.integers(0, size))
    assert_same_chunk(SparseSum(tensors, (kept,), (1.0,)), tensors, F32, start, data.draw(st.integers(start, size)))


@pytest.mark.parametrize("last", range(-1, 6))
def test_a_tie_is_chosen_up_to_its_last_index(last):
    tensors = tensors_of([torch.ones(5)], torch.zeros(5))
    for other in range(-1, 6):
        plan = SparseSum(tensors, (Kept(Cut(1.0, last), Cut(1.0, other)),), (1.0,))
        wanted = [float(other < i <= last) for i in range(5)]
        for start in range(5):
            assert merge_chunk(plan, tensors, start, 5, F32).values.tolist() == wanted[start:]
            assert plan(start, 5).tolist() == wanted[start:]


def test_signs_are_elected_by_hand():
    """Golden 3 to 5 of the field."""
    base, one, other = torch.zeros(4), torch.tensor([4.0, -3, 2, -1]), torch.tensor([-1.0, 5, 3, -2])
    tensors = tensors_of([one, other], base)
    kept = tuple(kept_of([one, other], base, 0.5))

    def merged(**settings):
        return merge_chunk(SparseSum(tensors, kept, **settings), tensors, 0, 4, F32).values.tolist()

    assert merged(weights=(1.0, 1.0), elect=True, normalize=True) == [4, 5, 3, 0]
    assert merged(weights=(2.0, 1.0), elect=True, normalize=True) == [4, -3, 3, 0]
    assert merged(weights=(2.0, 1.0), elect=True) == [8, -6, 3, 0]
    assert merged(weights=(2.0, 1.0), total=2.0) == [4, -0.5, 1.5, 0]
    assert elect_and_combine(torch.tensor([[2.0], [-2.0]]).double(), (1, 1), elect=True, normalize=True).item() == 2
    three = torch.tensor([[3.0], [-1.0], [-1.0]]).double()
    assert elect_and_combine(three, (1, 1, 1), elect=True, normalize=True).item() == 3
    opposed = torch.tensor([[1.0], [1.0]]).double()
    assert elect_and_combine(opposed, (1, -1), elect=True, normalize=True).item() == 2  # weights cancel: divided by 1
    tensors = tensors_of([torch.ones(1), -torch.ones(1)], torch.zeros(1))
    plan = SparseSum(tensors, (Kept(), Kept()), (1.0, -1.0), elect=True, normalize=True)
    assert merge_chunk(plan, tensors, 0, 1, F32).values.item() == 2


def test_drops_are_those_of_the_stream_wherever_a_piece_begins():
    count = 5000
    tensors = tensors_of([torch.ones(count)], torch.zeros(count), seed=11)
    plan = SparseSum(tensors, (Kept(probability=0.3, stream="x/1", factor=1 / 0.3),), (1.0,))
    whole = merge_chunk(plan, tensors, 0, count, F64).values
    assert torch.equal(whole != 0, bernoulli(11, "x/1", 0.3, count))
    assert abs(float(whole.mean()) - 1) < 5 * math.sqrt(0.7 / 0.3 / count)
    for size in (1, 3, 1000, 1025):
        pieces = [merge_chunk(plan, tensors, a, b, F64).values for a, b in blocks(count, size) if a < 4000]
        assert torch.equal(torch.cat(pieces), whole[: sum(map(len, pieces))])


def test_an_element_is_kept_if_its_number_is_below_the_probability():
    numbers = uniform(11, "x/1", 9)
    tensors = tensors_of([torch.ones(9)], torch.zeros(9), seed=11)
    for k, number in enumerate(numbers.tolist()):
        for probability, kept in [(number, 0.0), (math.nextafter(number, 1), 1.0)]:
            plan = SparseSum(tensors, (Kept(probability=probability, stream="x/1"),), (1.0,))
            assert merge_chunk(plan, tensors, k, k + 1, F32).values.item() == kept == plan(k, k + 1).item()


@pytest.mark.parametrize("raw", [True, False])
def test_damage_is_told_with_its_place(raw):
    count = BLOCK + 3000
    base, a, b = (torch.ones(count) for _ in range(3))
    tensors = tensors_of([a, b], base, raw=raw)
    sums = WeightedSum(tensors, (1.0, 0.0)), SparseSum(tensors, (Kept(low=Cut(math.inf)),) * 2, (1.0, 1.0))
    a[BLOCK + 2000], b[BLOCK + 1000], base[count - 1] = math.nan, math.inf, math.nan
    for plan in sums:
        assert merge_chunk(plan, tensors, 5, count, F32).damaged == (1, BLOCK + 1000)
        assert merge_chunk(plan, tensors, BLOCK + 1001, count, F32).damaged == (0, BLOCK + 2000)
        assert merge_chunk(plan, tensors, BLOCK + 2001, count, F32).damaged == (2, count - 1)
    assert merge_chunk(sums[0], tensors, 5, count, F32).beyond == BLOCK + 1000  # infinity times 0
    a[100], b[101], base[102] = (math.nan,) * 3
    for stop in (200, count):
        chunk = merge_chunk(sums[0], tensors, 90, stop, F32)
        assert chunk.damaged == (0, 100) and chunk.beyond == 100
    assert merge_chunk(sums[1], tensors, 101, 200, F32).damaged == (1, 101)
    a[103], b[103] = (math.nan,) * 2
    assert merge_chunk(sums[1], tensors, 102, 200, F32).damaged == (2, 102)
    assert merge_chunk(sums[1], tensors, 103, 200, F32).damaged == (0, 103)
    large = tensors_of([torch.full((3000,), 6e4)] * 2, raw=raw)
    chunk = merge_chunk(WeightedSum(large, (1.0, 1.0)), large, 7, 3000, F16)
    assert chunk.damaged is None and chunk.beyond == 7 and bool(chunk.values.isinf().all())


def test_a_damaged_entry_is_kept_and_spreads():
    """Where NaN is allowed it is larger than every size, and the sum has it too."""
    model = torch.tensor([1.0, math.nan, 3.0, -2.0])
    tensors = tensors_of([model, torch.zeros(4)], torch.zeros(4))
    for elect in (False, True):
        plan = SparseSum(tensors, (Kept(low=Cut(3.0, 2)), Kept()), (1.0, 1.0), elect=elect, normalize=elect)
        for values in (merge_chunk(plan, tensors, 0, 4, F32).values, plan(0, 4)):
            assert values.isnan().tolist() == [False, True, False, False] and values[2] == 3 and values[3] == 0


@pytest.mark.parametrize("unstored", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_models_that_are_not_simply_stored_are_read(unstored):
    base, *models = random_models(2 * BLOCK + 77, (BF16, BF16, F16))
    all_stored, some = tensors_of(models, base), tensors_of(models, base, unstored=unstored)
    for start, stop in [(0, 2 * BLOCK + 77), (11, BLOCK + 50)]:
        wanted = merge_chunk(WeightedSum(all_stored, (0.3, 0.4), True), all_stored, start, stop, BF16)
        got = merge_chunk(WeightedSum(some, (0.3, 0.4), True), some, start, stop, BF16)
        assert torch.equal(bits(wanted.values), bits(got.values)) and wanted.lost == got.lost
        parts = list(operands(some, start, stop, some.base))
        assert [p.count for _, p in parts] == (
            [stop - start] if not unstored else [b - a for a, b in blocks(stop - start)]
        )
    assert torch.equal(gram(some, deltas=True), gram(all_stored, deltas=True))


def test_bytes_that_lie_askew_are_moved_and_missing_ones_refused():
    model = torch.arange(100, dtype=F32)
    askew = np.empty(401, np.uint8)[1:]
    askew[:] = model.view(torch.uint8).numpy()
    tensors = dataclasses.replace(tensors_of([model]), raw=lambda a, b: (None, [askew], None, ["F32"]))
    assert torch.equal(merge_chunk(WeightedSum(tensors, (1.0,)), tensors, 0, 100, F32).values, model)
    short = dataclasses.replace(tensors, raw=lambda a, b: (None, [askew[:-4]], None, ["F32"]))
    with pytest.raises(ValueError, match="396 bytes for 100 elements"):
        merge_chunk(WeightedSum(short, (1.0,)), short, 0, 100, F32)


def test_a_type_without_a_kernel_is_read():
    model = torch.arange(8, dtype=F32)
    tensors = dataclasses.replace(
        tensors_of([model]), raw=lambda a, b: (None, [model[a:b].view(torch.uint8).numpy()], None, ["F8_E8M0"])
    )
    assert torch.equal(merge_chunk(WeightedSum(tensors, (2.0,)), tensors, 2, 8, F32).values, 2 * model[2:])


def test_every_model_needs_its_settings():
    tensors = tensors_of([torch.ones(3)] * 2, torch.ones(3))
    kept = Kept()
    for plan in (
        WeightedSum(tensors, (1.0,)),
        SparseSum(tensors, (kept,), (1.0, 1.0)),
        SparseSum(tensors, (kept, kept), (1.0,)),
    ):
        with pytest.raises(ValueError, match="1 settings for 2 models"):
            merge_chunk(plan, tensors, 0, 3, F32)


def test_a_base_is_needed():
    tensors = tensors_of([torch.ones(3)])
    for plan in (WeightedSum(tensors, (1.0,), True), SparseSum(tensors, (Kept(),), (1.0,))):
        with pytest.raises(ConfigError, match="base_model"):
            merge_chunk(plan, tensors, 0, 3, F32)
    with pytest.raises(ConfigError, match="base_model"):
        gram(tensors, deltas=True)


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_gram_has_the_bits_of_its_plain_form(count, deltas):
    base, *models = random_models(count, (BF16, BF16, F32, F16))
    tensors = tensors_of(models, base)
    wanted = torch.zeros(3, 3, dtype=F64)
    for start, stop in blocks(count):
        wanted += gram_block(tensors.deltas(start, stop) if deltas else tensors.values(start, stop))
    for form in (tensors, tensors_of(models, base, raw=False)):
        assert torch.equal(gram(form, deltas=deltas), wanted)
    rows = tensors.deltas(0, count) if deltas else tensors.values(0, count)
    exact = [[math.fsum((x * y).tolist()) for y in rows] for x in rows]
    assert torch.allclose(wanted, torch.tensor(exact, dtype=F64), rtol=1e-13, atol=1e-11)


def test_gram_by_hand():
    tensors = tensors_of([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.tensor([1.0, 1.0]))
    assert gram(tensors, deltas=False).tolist() == [[5, 11], [11, 25]]
    assert gram(tensors, deltas=True).tolist() == [[1, 3], [3, 13]]


@pytest.mark.slow
def test_all_kernels_compile_in_seconds(tmp_path):
    """In a fresh process with an empty cache."""
    code = """
import time, torch
from honeloom.merging.engine import tensors as t, chunks, gram, select
x = torch.ones(9)
raw = lambda a, b: (x.view(torch.uint8).numpy(),) + ([x.view(torch.uint8).numpy()],) + ("F32", ["F32"])
read = lambda a, b: x[a:b].double()
models, begun = t.Tensors("x", (9,), (read,), (1.0,), read, raw=raw), time.process_time()
for plan in t.WeightedSum(models, (1.0,)), t.SparseSum(models, (t.Kept(),), (1.0,)):
    chunks.merge_chunk(plan, models, 0, 9, torch.float32)
gram.gram(models, deltas=True), select.largest_each(models, [[3]])
print(time.process_time() - begun)
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 60 and any(tmp_path.rglob("*.nbi"))
