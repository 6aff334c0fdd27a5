"""Rounding once: numpy is the oracle for half precision, exact arithmetic for bfloat16."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.ops.rounding import round_once


def test_torch_alone_rounds_twice():
    """Just above a tie: float32 drops the excess, and the tie then goes the wrong way."""
    value = torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64)
    assert float(value.half()) == 1
    assert float(round_once(value, torch.float16)) == 1 + 2**-10


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_half_precision_equals_numpy(values):
    with np.errstate(over="ignore"):
        wanted = np.array(values, dtype=np.float64).astype(np.float16)
    got = round_once(torch.tensor(values, dtype=torch.float64), torch.float16).numpy()
    assert wanted.tobytes() == got.tobytes()


@given(st.floats(-1e38, 1e38), st.sampled_from([0, 2**-9, 2**-9 + 2**-45, 2**-9 - 2**-45]))
@settings(max_examples=200, deadline=None)
def test_bfloat16_is_nearest(value, offset):
    value = float(torch.tensor(value).bfloat16()) * (1 + offset)
    got = round_once(torch.tensor([value], dtype=torch.float64), torch.bfloat16)
    bits = got.view(torch.int16)
    distance = abs(Fraction(float(got)) - Fraction(value))
    for step in (-1, 1):
        other = float((bits + step).view(torch.bfloat16))
        if math.isfinite(other):
            gap = abs(Fraction(other) - Fraction(value))
            assert distance < gap or (distance == gap and int(bits) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_special_values(dtype):
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e300, -1e-300], dtype=torch.float64)
    assert round_once(values, dtype).tolist() == values.to(dtype).tolist()
    assert bool(round_once(torch.tensor([math.nan], dtype=torch.float64), dtype).isnan().all())
