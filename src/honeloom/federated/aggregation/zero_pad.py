"""Averages of factors that are filled up with zeros."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.federated.aggregation.parts import check_parts, padded_mean, result_dtype
from honeloom.ops.lowrank import product_norm
from honeloom.types.updates import Combined, Part

__all__ = ["zero_pad"]


def zero_pad(parts: Sequence[Part], *, norm_weights: bool = False) -> Combined:
    """Fill B and A up with zeros to the largest rank and average each apart; scales are folded into B.

    Inexact as `fedit` is, and more so: a column that few clients have is shrunk twice.

    Parameters
    ----------
    parts : sequence of Part
        K updates of one (m, n) weight, of any ranks and scales.
    norm_weights : bool
        Weigh each client by the norm of its update, s_k |B_k A_k|, instead of by its share: the
        paper's sparsity-weighted form, here module by module. All norms zero: the shares count.

    Returns
    -------
    Combined
        b (m, r) and a (r, n) with r the largest rank.

    References
    ----------
    Cho et al. 2024 (HetLoRA), arXiv:2401.06432.
    """
    check_parts(parts)
    rank, dtype = max(part.rank for part in parts), result_dtype(parts)
    weights = [part.weight for part in parts]
    if norm_weights:
        norms = [abs(part.scale) * product_norm(part.b, part.a) if part.rank else 0.0 for part in parts]
        total = sum(norms)
        weights = [norm / total for norm in norms] if total else weights
    scales = [part.scale for part in parts]
    b = padded_mean([part.b for part in parts], [w * s for w, s in zip(weights, scales, strict=True)], 1, rank)
    a = padded_mean([part.a for part in parts], weights, 0, rank)
    return Combined(b.to(dtype), a.to(dtype))
