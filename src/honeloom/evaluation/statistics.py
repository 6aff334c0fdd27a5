"""Means with standard errors, and the paired bootstrap. Pure numpy on per-row numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from honeloom.ops.noise import uniform

__all__ = ["Comparison", "Estimate", "macro_bootstrap", "macro_mean", "paired_bootstrap", "ratio_mean"]

Array = NDArray[np.float64]
BLOCK = 1 << 20
"""Rows drawn at a time; the draws do not depend on it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error (None for fewer than two units), and the number of units."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Difference of two ratio means on the same rows, with its 95 % interval."""

    difference: float
    low: float
    high: float
    n: int


def ratio_mean(sums_N: Array, weights_N: Array) -> Estimate:
    """Weighted mean sum(sums) / sum(weights) with rows as independent units.

    The standard error is that of a ratio estimator (delta method): rows of many tokens count
    for more, and tokens within a row are not taken as independent.

    Parameters
    ----------
    sums_N, weights_N : arrays of shape (N,)
        Per row: summed loss and scored tokens; or 0/1 and 1 for an accuracy.
    """
    n, total = len(sums_N), float(weights_N.sum())
    if n == 0 or total == 0:
        return Estimate(math.nan, None, n)
    value = float(sums_N.sum()) / total
    if n < 2:
        return Estimate(value, None, n)
    residual = sums_N - value * weights_N
    return Estimate(value, math.sqrt(float((residual**2).sum()) * n / (n - 1)) / total, n)


def macro_mean(parts: list[Estimate]) -> Estimate:
    """Unweighted mean of several estimates, taken as independent."""
    value = sum(p.value for p in parts) / len(parts)
    errors = [p.stderr for p in parts]
    stderr = None if any(e is None for e in errors) else math.sqrt(sum((e or 0.0) ** 2 for e in errors)) / len(parts)
    return Estimate(value, stderr, sum(p.n for p in parts))


def paired_bootstrap(
    one_N: Array, other_N: Array, weights_N: Array, *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Difference of ratio means (one - other) on the same rows, with a percentile interval.

    Parameters
    ----------
    one_N, other_N : arrays of shape (N,)
        Per row: summed loss (or correctness) of the two models.
    weights_N : array of shape (N,)
        Per row: scored tokens (or 1).
    resamples : int
        Bootstrap draws of N rows with replacement.
    seed : int
        Of the draws.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    n = len(weights_N)
    gap = one_N - other_N
    draws = np.empty(resamples)
    block = max(1, BLOCK // n)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        numbers = uniform(seed, "bootstrap", count * n, start=start * n).numpy().reshape(count, n)
        picked = (numbers * n).astype(np.int64)
        draws[start : start + count] = gap[picked].sum(axis=1) / weights_N[picked].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Comparison(float(gap.sum() / weights_N.sum()), float(low), float(high), n)


def macro_bootstrap(
    one_N: Array, other_N: Array, domains: Sequence[str], shares: Mapping[str, float], *, resamples: int = 2000,
    seed: int = 0,
) -> Comparison:  # fmt: skip
    """Difference of weighted means over domains of ratio means (one - other), rows drawn domain by domain.

    Parameters
    ----------
    one_N, other_N : arrays of shape (N, 2)
        Per row: summed loss and weight of the two models; weights may differ, for example where one cuts a row. Rows
        without weight in both are left out.
    domains : sequence of str
        Of every row.
    shares : mapping
        Of every domain that counts, summing to 1.
    resamples, seed : int
        Bootstrap draws, and of what they follow.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13.
    """
    labels = np.array(domains)
    draws, middle, rows = np.zeros(resamples), 0.0, 0
    for domain, share in shares.items():
        pair = np.concatenate((one_N[labels == domain], other_N[labels == domain]), axis=1)
        pair = pair[(pair[:, 1] > 0) | (pair[:, 3] > 0)]  # draws of nothing but empty rows would have no mean
        count = len(pair)
        block = max(1, BLOCK // max(1, count))
        for start in range(0, resamples, block):
            some = min(block, resamples - start)
            numbers = uniform(seed, f"bootstrap/{domain}", some * count, start=start * count).numpy()
            sums = pair[(numbers.reshape(some, count) * count).astype(np.int64)].sum(axis=1)
            draws[start : start + some] += share * (sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])
        total = pair.sum(axis=0)
        middle += share * float(total[0] / total[1] - total[2] / total[3])
        rows += count
    low, high = np.quantile(draws, [0.025, 0.975])
    return Comparison(middle, float(low), float(high), rows)
