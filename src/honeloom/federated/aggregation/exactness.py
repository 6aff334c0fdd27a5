"""How far an aggregated update is from the sum it stands for, without a dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from honeloom.federated.aggregation.warm import whole
from honeloom.ops.lowrank import product_norm, stack_factors
from honeloom.ops.noise import normal
from honeloom.types.updates import Combined, Part

__all__ = ["ErrorNorms", "error_norms", "measured_error", "target_factors"]

_EXACT_RANKS = 96
"""Up to this many stacked columns, QR costs no more than a sketch."""


@dataclass(frozen=True, slots=True)
class ErrorNorms:
    """Frobenius norms: of aggregate minus target, of the target, and of all parts (root of their summed squares)."""

    difference: float
    target: float
    parts: float

    @property
    def relative(self) -> float:
        """Difference over target; 0 if both are zero, infinity if only the target is."""
        if self.target == 0.0:
            return 0.0 if self.difference == 0.0 else float("inf")
        return self.difference / self.target

    @property
    def scaled(self) -> float:
        """Difference over the larger of target and parts: rounding is of that size where parts cancel."""
        size = max(self.target, self.parts)
        return self.difference / size if size else self.difference


def target_factors(parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of p_k s_k B_k A_k as one product, b (m, R) and a (R, n), float64."""
    return stack_factors([(part.b, part.a, part.weight * part.scale) for part in parts])


def error_norms(combined: Combined, parts: Sequence[Part], *, columns: int = 32, seed: int = 0) -> ErrorNorms:
    """Norms of aggregate minus target, target and parts, in float64.

    Few columns are handled exactly, by QR. Many are multiplied with random columns, which gives
    each norm with a relative standard error of at most 1 / sqrt(2 `columns`).

    Parameters
    ----------
    combined : Combined
        The aggregate, residual included; (m, n).
    parts : sequence of Part
        The clients' updates.
    columns : int
        Random columns.
    seed : int
        Of the columns.
    """
    b, a = (t.double() for t in whole(combined))
    pairs = [(part.b.double() * (part.weight * part.scale), part.a.double()) for part in parts if part.rank]
    if b.shape[1] + sum(x.shape[1] for x, _ in pairs) <= _EXACT_RANKS:
        target = stack_factors([(x, y, 1.0) for x, y in pairs])
        difference = product_norm(*stack_factors([(b, a, 1.0), (*target, -1.0)]))
        sizes = [product_norm(x, y) for x, y in pairs]
        return ErrorNorms(difference, product_norm(*target), sum(size**2 for size in sizes) ** 0.5)
    n = a.shape[1]
    draws = normal(seed, "exactness", n * columns, dtype=torch.float64, device=a.device).view(n, columns)
    sketches = [x @ (y @ draws) for x, y in pairs]
    target_sketch = torch.stack(sketches).sum(dim=0)
    unit = columns**0.5
    return ErrorNorms(
        float((b @ (a @ draws) - target_sketch).norm()) / unit,
        float(target_sketch.norm()) / unit,
        sum(float(s.square().sum()) for s in sketches) ** 0.5 / unit,
    )


def measured_error(combined: Combined, parts: Sequence[Part], *, columns: int = 32, seed: int = 0) -> float:
    """Relative error of an aggregate: |aggregate - sum p_k s_k B_k A_k| / |sum p_k s_k B_k A_k|, Frobenius.

    Parameters
    ----------
    combined, parts, columns, seed
        As of `error_norms`.

    Returns
    -------
    float
        0 if both are zero, infinity if only the target is.
    """
    return error_norms(combined, parts, columns=columns, seed=seed).relative
