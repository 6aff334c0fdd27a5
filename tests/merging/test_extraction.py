"""The low-rank part of a matrix: by hand, and against the exact decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.merging.extract_config import DEFAULT_RANK, ExtractConfig
from honeloom.merging.extraction import extract_factors

DIAGONAL = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
"""Squares 16, 9, 4, 1; together 30."""


def with_spectrum(values, rows, columns, seed=0):
    """A matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return (u * torch.as_tensor(values, dtype=torch.float64)) @ v.T


def error(delta, factors):
    return float(torch.linalg.matrix_norm(delta - factors[0] @ factors[1]))


@pytest.mark.parametrize(("rank", "square"), [(1, 14), (2, 5), (3, 1), (4, 0), (9, 0)])
def test_the_error_is_what_the_singular_values_left_out_hold(rank, square):
    """Golden: rank-r error squared is the sum of the squared singular values beyond r."""
    b, a = extract_factors(DIAGONAL, rank=rank)
    assert (b.shape, a.shape) == ((4, min(rank, 4)), (min(rank, 4), 4))
    assert error(DIAGONAL, (b, a)) ** 2 == pytest.approx(square, abs=1e-12)


@pytest.mark.parametrize(
    ("energy", "rank", "columns"),
    [(0.5, None, 1), (16 / 30 + 1e-9, None, 2), (0.8, None, 2), (0.84, None, 3), (1.0, None, 4), (0.84, 2, 2)],
)
def test_as_few_columns_as_hold_the_energy(energy, rank, columns):
    assert extract_factors(DIAGONAL, energy=energy, rank=rank)[0].shape[1] == columns


def test_a_flat_spectrum_takes_many_columns():
    delta = with_spectrum([1.0] * 80, 100, 80)
    assert extract_factors(delta, energy=0.99)[0].shape[1] == 80  # 79 of 80 hold 0.9875
    assert extract_factors(delta, energy=0.9875)[0].shape[1] in (79, 80)  # rounding decides
    assert extract_factors(delta, energy=0.3)[0].shape[1] == 24


def test_singular_values_are_shared_evenly():
    b, a = extract_factors(DIAGONAL, rank=2)
    roots = torch.tensor([2.0, 3.0**0.5], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.vector_norm(b, dim=0), roots)
    torch.testing.assert_close(torch.linalg.vector_norm(a, dim=1), roots)


def test_a_large_matrix_is_as_good_as_the_best():
    spectrum = [2.0**-k for k in range(60)]
    delta = with_spectrum(spectrum, 300, 120)
    for rank in (4, 16):
        best = sum(s**2 for s in spectrum[rank:]) ** 0.5
        assert best * (1 - 1e-9) <= error(delta, extract_factors(delta, rank=rank)) <= best * (1 + 1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(0, 2**32 - 1))
def test_never_better_than_the_best_and_exact_at_full_rank(rows, columns, rank, seed):
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(delta))
    found = error(delta, extract_factors(delta, rank=rank, seed=seed))
    best = float(torch.linalg.svdvals(delta)[rank:].square().sum().sqrt())
    assert best - 1e-12 * norm <= found <= 1.15 * best + 1e-12 * norm  # Gaussian spectra are the flattest there are


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_the_energy_is_held_by_few_columns(rows, columns, energy, seed):
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factors = extract_factors(delta, energy=energy, seed=seed)
    total, keep = float(delta.square().sum()), factors[0].shape[1]
    assert error(delta, factors) ** 2 <= (1 - energy + 1e-9) * total
    held = torch.linalg.svdvals(delta).square().cumsum(0)
    needed = int((held < energy * total * (1 - 1e-12)).sum()) + 1
    assert needed <= keep <= needed + 2


@pytest.mark.parametrize("settings", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_amounts_out_of_range(settings):
    with pytest.raises(ValueError, match="must be"):
        extract_factors(DIAGONAL, **settings)


def test_the_default_rank_does_not_limit_the_energy():
    names = {"tuned": "a", "base": "b"}
    assert ExtractConfig(**names).amount() == {"rank": DEFAULT_RANK, "energy": None}
    assert ExtractConfig(**names, energy=0.9).amount() == {"rank": None, "energy": 0.9}
    assert ExtractConfig(**names, energy=0.9, rank=4).amount() == {"rank": 4, "energy": 0.9}
