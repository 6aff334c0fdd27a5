"""Low-rank products against dense matrices and closed forms."""

from __future__ import annotations

import pytest
import torch

from honeloom.ops.lowrank import (
    LinearMap,
    compress,
    product_norm,
    randomised_svd,
    relative_error,
    stack_factors,
    thin_svd,
    truncate,
)  # fmt: skip
from honeloom.ops.noise import normal


def random(name: str, *shape: int) -> torch.Tensor:
    return normal(0, name, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def test_stacking_is_the_exact_sum():
    parts = [(random("b1", 7, 2), random("a1", 2, 5), 0.5), (random("b2", 7, 3), random("a2", 3, 5), -2.0)]
    b, a = stack_factors(parts)
    assert (b.shape, a.shape) == ((7, 5), (5, 5))
    torch.testing.assert_close(b @ a, sum(s * x @ y for x, y, s in parts), rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="at least one"):
        stack_factors([])


@pytest.mark.parametrize(("m", "r", "n"), [(9, 3, 6), (3, 5, 8), (8, 5, 3), (4, 4, 4)])
def test_thin_svd(m, r, n):
    b, a = random("b", m, r), random("a", r, n)
    u, s, vt = thin_svd(b, a)
    k = min(m, r, n)
    torch.testing.assert_close((u * s) @ vt, b @ a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s[:k], torch.linalg.svdvals(b @ a)[:k], rtol=1e-12, atol=1e-12)


def test_truncation_of_a_known_spectrum():
    """Singular values 3, 4, 12: rank 1 keeps 144 of 169, so the error is 5/13."""
    b, a = torch.diag(torch.tensor([3.0, 12.0, 4.0])), torch.eye(3)
    _, _, error = truncate(b, a, rank=1)
    assert error == pytest.approx(5 / 13)
    kept_b, kept_a, error = truncate(b, a, rank=2)
    assert error == pytest.approx(3 / 13)
    torch.testing.assert_close(kept_b @ kept_a, torch.diag(torch.tensor([0.0, 12.0, 4.0])).double())
    assert truncate(b, a, rank=3)[2] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (144 / 169 - 1e-9, 1), (0.9, 2), (160 / 169 + 1e-9, 3), (1.0, 3)]
)
def test_energy_keeps_the_fewest_columns(energy, rank):
    kept, _, _ = truncate(torch.diag(torch.tensor([3.0, 12.0, 4.0])), torch.eye(3), energy=energy)
    assert kept.shape[1] == rank


def test_truncating_zero_and_nonsense():
    kept_b, kept_a, error = truncate(torch.zeros(4, 2), torch.zeros(2, 3), rank=1, energy=0.9)
    assert error == 0
    assert torch.equal(kept_b @ kept_a, torch.zeros(4, 3).double())
    for wrong in ({}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(ValueError, match="rank"):
            truncate(torch.eye(2), torch.eye(2), **wrong)


def test_relative_error_is_exact_even_when_tiny():
    b, a = random("b", 30, 4), random("a", 4, 20)
    assert relative_error(2 * b, a, b, a) == pytest.approx(1, rel=1e-14)
    nudged = b.clone()
    nudged[0, 0] += 1e-10
    wanted = 1e-10 * float(a[0].norm()) / float((b @ a).norm())
    assert relative_error(nudged, a, b, a) == pytest.approx(wanted, rel=1e-4)
    zero = torch.zeros(30, 4)
    assert relative_error(zero, a, zero, a) == 0
    assert relative_error(b, a, zero, a) == float("inf")


@pytest.mark.parametrize("as_map", [False, True])
def test_randomised_svd_of_a_low_rank_matrix(as_map):
    dense = random("b", 40, 5) @ random("a", 5, 30)
    given = LinearMap((40, 30), lambda x: dense @ x, lambda x: dense.T @ x) if as_map else dense
    u, s, vt = randomised_svd(given, 5)
    torch.testing.assert_close((u * s) @ vt, dense, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(u.T @ u, torch.eye(5).double(), rtol=1e-10, atol=1e-10)
    assert torch.equal(randomised_svd(given, 5)[1], s)


def test_randomised_svd_of_a_full_matrix():
    dense = torch.diag(0.7 ** torch.arange(20).double())
    _, s, _ = randomised_svd(dense, 6, iterations=4)
    torch.testing.assert_close(s, 0.7 ** torch.arange(6).double(), rtol=1e-6, atol=0)
    assert randomised_svd(dense, 50)[1].shape == (20,)
    with pytest.raises(ValueError, match="rank"):
        randomised_svd(dense, 0)


@pytest.mark.parametrize(("m", "r", "n"), [(90, 6, 70), (9, 3, 6), (3, 5, 8), (8, 5, 3)])
def test_compressing_is_truncating(m, r, n):
    b, a = random("b", m, r), random("a", r, n)
    for options in ({"rank": 2}, {"energy": 0.9}, {"rank": 3, "energy": 0.5}):
        kept_b, kept_a = compress(b, a, **options)
        best_b, best_a, _ = truncate(b, a, **options)
        assert kept_b.shape == best_b.shape
        torch.testing.assert_close(kept_b @ kept_a, best_b @ best_a, rtol=1e-9, atol=1e-9)
    whole_b, whole_a = compress(b, a)
    assert whole_b.shape[1] == min(m, r, n)
    torch.testing.assert_close(whole_b @ whole_a, b @ a, rtol=1e-9, atol=1e-9)


def test_compressing_repeated_and_zero_columns():
    b, a = random("b", 40, 4), random("a", 4, 30)
    b, a = torch.cat([b, b, b * 0], dim=1), torch.cat([a, a, a], dim=0)
    for rank in (4, 12):
        kept_b, kept_a = compress(b, a, rank=rank)
        assert relative_error(kept_b, kept_a, b, a) <= 1e-7
    zero_b, zero_a = compress(b * 0, a, rank=3)
    assert float((zero_b @ zero_a).norm()) == 0.0
    with pytest.raises(ValueError, match="energy"):
        compress(b, a, energy=2.0)


def test_the_norm_of_a_product():
    b, a = random("b", 20, 5), random("a", 5, 30)
    assert product_norm(b, a) == pytest.approx(float((b @ a).norm()))
