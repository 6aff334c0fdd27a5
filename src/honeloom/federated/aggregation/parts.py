"""What every rule needs of its parts: that they fit together, and sums over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from honeloom.errors import IncompatibleModelsError
from honeloom.types.updates import Part

__all__ = ["all_equal", "check_parts", "padded_mean", "present_parts", "result_dtype"]


def check_parts(parts: Sequence[Part]) -> None:
    """Raise IncompatibleModelsError unless all parts update one (m, n) weight and at least one has a rank.

    A weight that is negative or not finite, or a scale that is not finite, is refused too.
    """
    if not any(part.rank for part in parts):
        raise IncompatibleModelsError("no client has factors for it; leave the module out")
    for part in parts:
        b, a = tuple(part.b.shape), tuple(part.a.shape)
        if len(b) != 2 or len(a) != 2 or b[1] != a[0]:
            raise IncompatibleModelsError(f"factors B {b} and A {a} have no product; B is (m, r) and A (r, n)")
        if not part.weight >= 0 or not math.isfinite(part.weight) or not math.isfinite(part.scale):
            raise IncompatibleModelsError(
                f"weight {part.weight} and scale {part.scale} of a client must be finite, the weight 0 or more"
            )
    shapes = [(part.b.shape[0], part.a.shape[1]) for part in parts]
    if len(set(shapes)) > 1:
        raise IncompatibleModelsError(
            f"the clients' updates have shapes {list(dict.fromkeys(shapes))}; they were tuned on different models"
        )


def present_parts(parts: Sequence[Part], rule: str) -> list[Part]:
    """Return the parts that have factors; IncompatibleModelsError names `rule` unless their ranks are equal."""
    check_parts(parts)
    present = [part for part in parts if part.rank]
    ranks = [part.rank for part in present]
    if len(set(ranks)) > 1:
        raise IncompatibleModelsError(
            f"{rule} averages factors column by column, so all ranks must be equal; they are {ranks}. "
            "flora and svd take any ranks"
        )
    return present


def result_dtype(parts: Sequence[Part]) -> torch.dtype:
    """Type of a rule's result: float64 if any factor is, else float32."""
    wide = any(t.dtype is torch.float64 for part in parts for t in (part.b, part.a))
    return torch.float64 if wide else torch.float32


def padded_mean(factors: Sequence[torch.Tensor], weights: Sequence[float], dim: int, rank: int) -> torch.Tensor:
    """Weighted sum of factors, each filled up with zeros along `dim`.

    Parameters
    ----------
    factors : sequence of Tensor
        All (m, r_k) with `dim` 1, or all (r_k, n) with `dim` 0.
    weights : sequence of float
        One per factor.
    dim : int
        The dimension of the rank.
    rank : int
        Of the result, at least every r_k.

    Returns
    -------
    Tensor
        (m, rank) or (rank, n), float64.
    """
    shape = list(factors[0].shape)
    shape[dim] = rank
    total = torch.zeros(shape, dtype=torch.float64, device=factors[0].device)
    for factor, weight in zip(factors, weights, strict=True):
        total.narrow(dim, 0, factor.shape[dim]).add_(factor.double(), alpha=weight)
    return total


def all_equal(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors have equal values, whatever their types."""
    first = tensors[0].double()
    return all(torch.equal(first, t.double()) for t in tensors[1:])
