"""Which coalitions to evaluate: streams that follow from the seed and the row's number alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from honeloom.ops import noise

__all__ = ["BATCH", "bernoulli", "half_size", "kernel_size", "order", "with_complements"]

BoolArray = npt.NDArray[np.bool_]
BATCH = 64
"""Coalitions per batch; the coalitions themselves do not depend on it."""


def bernoulli(n: int, seed: int) -> Iterator[BoolArray]:
    """Yield coalitions in which every player is by a fair coin; batches of shape (BATCH, n)."""
    start = 0
    while True:
        coins = noise.bernoulli(seed, "valuation/bernoulli", 0.5, BATCH * n, start=start)
        yield coins.numpy().reshape(BATCH, n)
        start += BATCH * n


def half_size(n: int, seed: int) -> Iterator[BoolArray]:
    """Yield coalitions of exactly half the players; for odd n, of (n - 1)/2 and (n + 1)/2 in turn."""
    row = 0
    while True:
        sizes = (n + np.arange(row, row + BATCH) % 2) // 2
        yield _of_sizes(sizes, n, seed, "valuation/half", row)
        row += BATCH


def kernel_size(n: int, seed: int) -> Iterator[BoolArray]:
    """Yield coalitions whose size s has probability proportional to 1 / (s (n - s)), 1 to n - 1.

    Sampled so, least squares with equal weights has the Shapley kernel's weights; n must be 2 or more.
    """
    weights = 1.0 / (np.arange(1, n) * np.arange(n - 1, 0, -1))
    edges = np.cumsum(weights) / weights.sum()
    edges[-1] = 1.0
    row = 0
    while True:
        draws = noise.uniform(seed, "valuation/size", BATCH, start=row).numpy()
        sizes = 1 + np.searchsorted(edges, draws, side="right")
        yield _of_sizes(sizes, n, seed, "valuation/kernel", row)
        row += BATCH


def with_complements(design: Iterator[BoolArray]) -> Iterator[BoolArray]:
    """Follow every coalition by its complement; batches of shape (2 BATCH, n)."""
    for batch in design:
        paired = np.empty((2 * len(batch), batch.shape[1]), dtype=np.bool_)
        paired[0::2], paired[1::2] = batch, ~batch
        yield paired


def order(n: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """Return the `number`-th random permutation of the players, shape (n,)."""
    permutation: npt.NDArray[np.int64] = noise.permutation(seed, f"valuation/order/{number}", n).numpy()
    return permutation


def _of_sizes(sizes: npt.NDArray[np.int64], n: int, seed: int, name: str, first: int) -> BoolArray:
    """Uniform coalitions of given sizes: the players with the smallest of n random keys."""
    rows = len(sizes)
    keys = noise.uniform(seed, name, rows * n, start=first * n).numpy().reshape(rows, n)
    ranks = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1, kind="stable")
    inside: BoolArray = ranks < sizes[:, None]
    return inside
