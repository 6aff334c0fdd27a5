"""Tensors for the tests of merge methods, and a plan asked in pieces."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st

from honeloom.merging.engine.tensors import Merged, Read, Rule, Tensors
from honeloom.ops.noise import normal

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
shapes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
)
dtypes = st.sampled_from(DTYPES)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(shape: Sequence[int], count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Other tensors for each shape and place."""
    size = torch.Size(shape)
    return [normal(size.numel(), f"model/{k}", size.numel()).view(size).to(dtype) for k in range(count)]


def group(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    base: torch.Tensor | None = None,
    data: Sequence[torch.Tensor] = (),
    name: str = "",
    seed: int = 0,
) -> Tensors:
    return Tensors(
        name, tuple(tensors[0].shape), tuple(map(_read, tensors)), tuple(weights or [1.0] * len(tensors)),
        None if base is None else _read(base), tuple(map(_read, data)), seed,
    )  # fmt: skip


def _read(tensor: torch.Tensor) -> Read:
    flat = tensor.reshape(-1).double()
    return lambda start, stop: flat[start:stop]


def pieces(merged: Merged, count: int, seed: int = 0) -> torch.Tensor:
    """A result assembled from random ranges, asked in random order."""
    dice = random.Random(seed)
    ends = sorted({0, count, *(dice.randint(0, count) for _ in range(7))})
    ranges = list(pairwise(ends))
    dice.shuffle(ranges)
    result = torch.full((count,), torch.nan, dtype=torch.float64)
    for start, stop in ranges:
        result[start:stop] = merged(start, stop)
    return result


def require_same_bits_in_pieces(
    rule: Rule,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    **given: Any,
) -> torch.Tensor:
    """The merged tensor, after comparing it with one assembled from pieces; no input may change."""
    settings = settings or {}
    inputs = [*tensors, *([given["base"]] if "base" in given else []), *given.get("data", ())]
    before = [x.clone() for x in inputs]
    whole = rule(tensors, weights, **given, **settings)
    plan = rule.plan(group(tensors, weights, **given), **settings)
    for seed in range(3):
        assert torch.equal(pieces(plan, whole.numel(), seed), whole.reshape(-1))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input was changed"
    assert whole.dtype == torch.float64
    return whole
