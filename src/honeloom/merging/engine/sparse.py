"""Sums of sparse task vectors in plain torch: the reference that the compiled kernel equals to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honeloom.merging.engine.tensors import Kept, SparseSum
from honeloom.ops.noise import bernoulli

__all__ = ["elect_and_combine", "sparse_sum"]


def sparse_sum(plan: SparseSum, start: int, stop: int) -> torch.Tensor:
    """Elements start..stop of a `SparseSum`.

    Parameters
    ----------
    plan : SparseSum
        K models with a base.
    start, stop : int
        Range of the flattened tensor.

    Returns
    -------
    Tensor
        (stop - start,), float64. Products and sums are rounded one by one, in the order of the models.

    Raises
    ------
    ConfigError
        There is no base.

    References
    ----------
    Yadav et al. 2023 (election of signs), arXiv:2306.01708; Yu et al. 2024 (random drops), arXiv:2311.03099.
    """
    origin = plan.tensors.origin(start, stop)
    scaled = []
    for read, kept, weight in zip(plan.tensors.models, plan.kept, plan.weights, strict=True):
        delta = read(start, stop) - origin
        chosen = _chosen(kept, delta.abs(), start, plan.tensors.seed)
        scaled.append(torch.where(chosen, weight * (delta * kept.factor), 0.0))
    combined = elect_and_combine(
        torch.stack(scaled), plan.weights, elect=plan.elect, normalize=plan.normalize, total=plan.total
    )
    return origin + plan.scale * combined


def _chosen(kept: Kept, sizes: torch.Tensor, start: int, seed: int) -> torch.Tensor:
    chosen = torch.ones(len(sizes), dtype=torch.bool)
    if kept.low is not None:
        chosen &= kept.low(sizes, start)
    if kept.high is not None:
        chosen &= ~kept.high(sizes, start)
    if kept.probability < 1:
        chosen &= bernoulli(seed, kept.stream, kept.probability, len(sizes), start=start)
    return chosen


def elect_and_combine(
    scaled: torch.Tensor, weights: Sequence[float], *, elect: bool, normalize: bool = False, total: float = 1.0
) -> torch.Tensor:
    """Sum models' entries, all of them or those with the elected sign.

    Parameters
    ----------
    scaled : Tensor
        (K, n), float64: entries times weights; 0 where an entry does not count.
    weights : sequence of float
        K numbers.
    elect : bool
        Sum only entries that are not 0 and have the sign of the sum of all (+ if that is 0).
    normalize : bool
        With election: divide by the sum of the weights of what is summed, by 1 where that is 0.
    total : float
        Without election: divide by this.

    Returns
    -------
    Tensor
        (n,), float64.

    References
    ----------
    Yadav et al. 2023 (TIES-Merging), arXiv:2306.01708.
    """
    everything = _in_order(scaled)
    if not elect:
        return everything / total
    chosen = (scaled != 0) & ((scaled < 0) == (everything < 0))
    combined = _in_order(torch.where(chosen, scaled, 0.0))
    if not normalize:
        return combined
    shares = torch.tensor(list(weights), dtype=torch.float64).unsqueeze(1)
    weight = _in_order(torch.where(chosen, shares, 0.0))
    return combined / torch.where(weight == 0, 1.0, weight)


def _in_order(rows: torch.Tensor) -> torch.Tensor:
    """Sum over the rows, one after the other; torch's own sum may add them in another order."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows:
        total += row
    return total
