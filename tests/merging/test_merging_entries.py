"""Rules that choose single entries: sce, nearswap, arcee fusion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_checks import drawn, dtypes, require_same_bits_in_pieces, shapes, t

from honeloom.merging.arcee_fusion import arcee_fusion
from honeloom.merging.nearswap import nearswap
from honeloom.merging.sce import sce


def test_nearswap_by_hand():
    assert nearswap([t(0.1, 10)], base=t(0, 0), t=1).tolist() == [0.1, 1]
    assert nearswap([t(1, 1, 1)], base=t(1, 5, -5), t=2).tolist() == [1, 3, -3]
    base, x = drawn((40,), 2)
    merged = nearswap([x], base=base, t=0.25)
    share = (0.25 / (base - x).abs()).clamp(0, 1)
    torch.testing.assert_close(merged, share * x + (1 - share) * base)


def test_sce_by_hand():
    assert sce([t(2, 0), t(1, 0)], base=t(0, 0), select_topk=1.0).tolist() == pytest.approx([1.8, 0])
    assert sce([t(3, -4)], base=t(1, 1)).tolist() == [3, -4], "one model is taken whole"
    assert sce([t(1, 2), t(1, 2)], base=t(0, 0)).tolist() == [0, 0], "nothing differs, nothing is selected"
    assert sce([t(1, 2), t(1, 2)], base=t(0, 0), select_topk=1.0).tolist() == [1, 2]
    assert sce([t(5, 6), t(5, 6)], base=t(5, 6), select_topk=1.0).tolist() == [5, 6]
    # Variances 4, 1, 0, 2.25: two of three are selected; energies 9 + 9 and 1 + 0; the signs are + and +.
    merged = sce([t(3, 1, 7, 3), t(-1, 3, 7, 0)], base=t(0, 0, 0, 0), select_topk=0.7)
    assert merged.tolist() == [3, 0, 0, 3]
    # The sum, and not the weighted sum, elects: 2 - 3 < 0 though the energies are 104 and 9.
    assert sce([t(2, 10), t(-3, 0)], base=t(0, 0), select_topk=1.0).tolist() == [-3, 10]
    assert sce([t(1, 4), t(-1, 2)], base=t(0, 0), select_topk=1.0).tolist() == [1, pytest.approx((17 * 4 + 5 * 2) / 22)]


def test_sce_counts_no_variance_that_rounding_made():
    same = t(0.1, 0.3, 0.7, 5)
    other = t(0.1, 0.3, 0.7, 6)
    merged = sce([same, same, other], base=t(0, 0, 0, 0), select_topk=0.5)
    assert merged.tolist() == [0, 0, 0, pytest.approx((25 * 5 + 25 * 5 + 36 * 6) / 86)]


@settings(max_examples=25, deadline=None)
@given(shapes, dtypes, st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_sce_equals_a_plain_reference(shape, dtype, share):
    base, *tensors = drawn(shape, 4, dtype)
    merged = require_same_bits_in_pieces(sce, tensors, base=base, settings={"select_topk": share})
    origin = base.double().reshape(-1).numpy()
    deltas = np.stack([x.double().reshape(-1).numpy() - origin for x in tensors])
    variances = np.var(deltas, axis=0)
    count = max(1, int(share * np.count_nonzero(variances) + 1e-9))
    if share < 1:
        chosen = np.argsort(-variances, kind="stable")[:count]
        mask = np.zeros(len(origin))
        mask[chosen] = 1
        deltas = deltas * mask
    weights = (deltas**2).sum(axis=1)
    sign = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(deltas) == sign
    below = (weights[:, None] * agrees).sum(axis=0)
    wanted = origin + (weights[:, None] * agrees * deltas).sum(axis=0) / np.where(below == 0, 1, below)
    np.testing.assert_allclose(merged.reshape(-1).numpy(), wanted, rtol=1e-12, atol=1e-14)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum() + 1e-8


def fused(model: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Arcee fusion of two matrices, row by row."""
    importance = np.empty_like(base)
    for i, (x, b) in enumerate(zip(model, base, strict=True)):
        p, q = softmax(x), softmax(b)
        importance[i] = np.abs(x - b) * max(0.0, float((p * np.log(p / q)).sum()))
    ordered = np.sort(importance.reshape(-1))
    low, median, high = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), model, base)


def test_arcee_fusion_by_hand():
    (base,) = drawn((3, 4), 1)
    assert torch.equal(arcee_fusion([base], base=base), base)
    # One row changes, so the quartiles are 0 of two rows in four and the whole changed row is taken.
    zero = torch.zeros(4, 2)
    changed = zero.clone()
    changed[2] = torch.tensor([3.0, -1.0])
    assert torch.equal(arcee_fusion([changed], base=zero), changed.double())
    # A small change beside a large one: the row 0, 0, 0, 0 to 0, 0.1, 0.2, 8 gives sizes in that ratio.
    assert arcee_fusion([t(0, 0.1, 0.2, 8)], base=torch.zeros(4)).tolist() == [0, 0, 0, 8]
    assert arcee_fusion([torch.zeros(0, 3)], base=torch.zeros(0, 3)).shape == (0, 3)


@settings(max_examples=25, deadline=None)
@given(shapes, dtypes, st.sampled_from([0.01, 1.0]))
def test_arcee_fusion_equals_a_plain_reference(shape, dtype, size):
    base, x = (v * size for v in drawn(shape, 2, dtype))
    merged = require_same_bits_in_pieces(arcee_fusion, [x], base=base)
    one, other = (v.double().reshape(-1, shape[-1]).numpy() for v in (x, base))
    taken = merged.view(one.shape).numpy()
    np.testing.assert_allclose(taken, fused(one, other), rtol=1e-12, atol=1e-14)
