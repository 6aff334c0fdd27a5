"""Select, calculate, erase."""

from __future__ import annotations

import torch

from honeloom.merging.engine.select import largest
from honeloom.merging.engine.sums import sums
from honeloom.merging.engine.tensors import Merged, Rule, Tensors, blocks
from honeloom.merging.task_vectors import share_of

__all__ = ["sce"]


def _plan_sce(tensors: Tensors, *, select_topk: float = 0.1) -> Merged:
    """Merge the entries on which the models differ most, each model by the energy of its selected changes.

    Select the entries with the largest variance over the models' task vectors; calculate each model's weight, the sum
    of its squared selected entries; erase what has not the sign of the entry's sum over the models; average the rest
    with the weights.

    Parameters
    ----------
    tensors : Tensors
        K models and their base. Weights do not count.
    select_topk : float
        Share, rounded down, of the entries on which the models are not all equal; 1 selects every entry. Of entries
        of one variance the first are selected. One model alone is taken whole.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        No base.

    References
    ----------
    Wan et al. 2024 (FuseChat), arXiv:2408.07990.
    """
    selected = _selection(tensors, select_topk)
    energies = sums(lambda start, stop: selected(start, stop).square_(), len(tensors.models), blocks(tensors.count))
    weights = energies if any(energies) else [1.0] * len(energies)

    def merged(start: int, stop: int) -> torch.Tensor:
        deltas = selected(start, stop)
        sign = torch.where(_total(deltas) >= 0, 1.0, -1.0)
        above = torch.zeros(stop - start, dtype=torch.float64)
        below = torch.zeros_like(above)
        for delta, weight in zip(deltas, weights, strict=True):
            share = (delta * sign > 0).double().mul_(weight)
            below += share
            above += share.mul_(delta)
        return above.div_(torch.where(below == 0, 1.0, below)).add_(tensors.origin(start, stop))

    return merged


sce = Rule(_plan_sce, needs_base=True)
"""Select entries that vary most between models, weight models by their energy, elect signs."""


def _selection(tensors: Tensors, share: float) -> Merged:
    """Task vectors, (K, n), zero where an entry is not selected."""
    if share >= 1 or len(tensors.models) == 1:
        return tensors.deltas
    differ = sums(lambda start, stop: _differ(tensors.values(start, stop)).double()[None], 1, blocks(tensors.count))
    cut = largest(lambda a, b: _variance(tensors.values(a, b)), tensors.count, share_of(share, int(differ[0])))

    def selected(start: int, stop: int) -> torch.Tensor:
        chosen = cut(_variance(tensors.values(start, stop)), start)
        return torch.where(chosen, tensors.deltas(start, stop), 0.0)

    return selected


def _differ(values: torch.Tensor) -> torch.Tensor:
    return (values[1:] != values[0]).any(dim=0)


def _variance(values: torch.Tensor) -> torch.Tensor:
    """Over K models, which is that over their task vectors, (K, n) to (n,); exactly 0 where all are equal."""
    mean = _total(values).div_(len(values))
    return _total((values - mean).square_()).div_(len(values)).mul_(_differ(values))


def _total(values: torch.Tensor) -> torch.Tensor:
    """Sum over the models in their order, (K, n) to (n,)."""
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for value in values:
        total += value
    return total
