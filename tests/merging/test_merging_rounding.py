"""The measure of rounding by which a merged checkpoint is judged."""

from __future__ import annotations

import math

import pytest
import torch

from honeloom.merging.engine.recompute import last_place_error
from honeloom.ops.noise import normal
from honeloom.ops.rounding import round_once


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
