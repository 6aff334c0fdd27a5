"""Merging by singular vectors: cases with known singular values, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from merging_checks import drawn, dtypes, require_same_bits_in_pieces, shapes, t

from honeloom.merging.engine.matrices import Whole
from honeloom.merging.spectral import iso_c, tsv_m


def outer(size: float, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return size * torch.outer(left / left.norm(), right / right.norm())


def test_isotropic_spectrum():
    delta = outer(6.0, t(1, 2, 2), t(3, 4, 0, 0))
    base = drawn((3, 4), 1)[0]
    merged = iso_c([base + delta], base=base) - base
    torch.testing.assert_close(torch.linalg.svdvals(merged), t(2, 2, 2))
    a, b = drawn((5, 3), 2)
    merged = iso_c([a, b], [1.0, 0.5], base=torch.zeros(5, 3), scale=0.3)
    u, s, vt = torch.linalg.svd(a + 0.5 * b, full_matrices=False)
    torch.testing.assert_close(merged, 0.3 * s.mean() * u @ vt)


def test_orthogonal_rank_one_changes_add_up():
    (q,), (p,) = (torch.linalg.qr(x).Q[None] for x in (drawn((4, 4), 1)[0], drawn((5, 4), 1)[0]))
    deltas = [outer(size, p[:, i], q[:, i]) for i, size in enumerate((3.0, 1.0))]
    base = drawn((5, 4), 1)[0]
    merged = tsv_m([base + d for d in deltas], base=base)
    torch.testing.assert_close(merged, base + deltas[0] + deltas[1])
    torch.testing.assert_close(tsv_m([base + d for d in deltas], [2, 1], base=base), base + 2 * deltas[0] + deltas[1])
    torch.testing.assert_close(tsv_m([base + d for d in deltas], base=base, scale=0.5), (merged + base) / 2)


def test_of_each_model_its_share_of_triplets_is_kept():
    a, b = torch.diag(t(8, 7, 2, 1)), torch.diag(t(1, 2, 5, 6))
    merged = tsv_m([a, b], base=torch.zeros(4, 4))
    torch.testing.assert_close(merged, torch.diag(t(8, 7, 5, 6)))
    one = drawn((4, 6), 1)[0]
    torch.testing.assert_close(tsv_m([one], base=torch.zeros(4, 6)), one)


def test_vectors_that_overlap_are_made_orthogonal():
    """Two rank-one changes with u1.u2 = 0.6: of 2-vectors the polar factor is known."""
    a, b = t(1, 0), t(0.6, 0.8)
    merged = tsv_m([outer(2.0, a, t(1, 0)), outer(1.0, b, t(0, 1))], base=torch.zeros(2, 2))
    stacked = torch.stack([a, b], dim=1)
    values, vectors = torch.linalg.eigh(stacked.T @ stacked)
    polar = stacked @ vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(merged, polar @ torch.diag(t(2, 1)))


def polar(x: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (30, 30)])
def test_both_equal_the_published_procedures(shape):
    """With plain singular value decompositions; ours come from eigenvectors where those are exact enough."""
    base, *tensors = drawn(shape, 4)
    deltas = [(x - base).numpy() for x in tensors]
    kept = [(u[:, :k], s[:k], vt[:k]) for u, s, vt in map(_thin, deltas) for k in [min(shape) // 3]]
    left, right = polar(np.hstack([u for u, _, _ in kept])), polar(np.hstack([vt.T for _, _, vt in kept]))
    wanted = left @ np.diag(np.concatenate([s for _, s, _ in kept])) @ right.T
    np.testing.assert_allclose((tsv_m(tensors, base=base) - base).numpy(), wanted, rtol=0, atol=1e-7)
    total = sum(deltas)
    wanted = np.linalg.svd(total, compute_uv=False).mean() * polar(total)
    np.testing.assert_allclose((iso_c(tensors, base=base) - base).numpy(), wanted, rtol=0, atol=1e-7)


def _thin(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(x, full_matrices=False)


def test_directions_in_common_and_empty_changes():
    base = drawn((6, 6), 1)[0]
    delta = outer(3.0, t(1, 2, 3, 4, 5, 6), t(1, 0, 0, 1, 0, 0))
    merged = tsv_m([base + delta, base + delta], base=base)
    torch.testing.assert_close(merged, base + delta)
    assert torch.equal(tsv_m([base, base], base=base), base)
    assert torch.equal(iso_c([base, base], base=base), base)
    torch.testing.assert_close(tsv_m([base + delta, base], base=base), base + delta)
    torch.testing.assert_close(tsv_m([base + delta, base - delta], [1, 0], base=base), base + delta)


def test_more_models_than_dimensions():
    base, *tensors = drawn((2, 3), 6)
    merged = tsv_m(tensors, base=base)
    assert bool(torch.isfinite(merged).all())
    assert float((merged - base).norm()) < 5 * max(float((x - base).norm()) for x in tensors)


@pytest.mark.parametrize("rule", [tsv_m, iso_c])
def test_what_is_no_matrix_gets_the_mean_change(rule):
    assert rule([t(3, 1), t(1, 3)], base=t(1, 1)).tolist() == [2, 2]
    assert rule([t(3, 1), t(1, 3)], [2, 1], base=t(1, 1), scale=0.5).tolist() == [2, 1.5]
    a, b, base = drawn((2, 3, 4), 3)
    torch.testing.assert_close(rule([a, b], base=base), (a + b) / 2)
    assert rule([torch.zeros(0, 3)], base=torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("rule", [tsv_m, iso_c])
@settings(max_examples=15, deadline=None)
@given(shape=shapes, dtype=dtypes)
def test_pieces_and_transposes(rule, shape, dtype):
    base, *tensors = drawn(shape, 4, dtype)
    merged = require_same_bits_in_pieces(rule, tensors, [1.0, 0.5, 2.0], base=base)
    if len(shape) == 2 and dtype == torch.float64:
        turned = rule([x.T.contiguous() for x in tensors], [1.0, 0.5, 2.0], base=base.T.contiguous())
        torch.testing.assert_close(turned.T, merged, rtol=1e-7, atol=1e-7)


def test_a_whole_result_is_computed_once_and_cannot_be_spoilt():
    calls = []

    def compute() -> torch.Tensor:
        calls.append(torch.get_num_threads())
        return torch.arange(6.0, dtype=torch.float64).view(2, 3)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = Whole(compute)
        assert calls == []
        result(1, 3).zero_()
        assert result(0, 6).tolist() == [0, 1, 2, 3, 4, 5]
        assert calls == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
