"""Rules on task vectors: make each sparse, perhaps elect a sign per entry, and add them to the base.

The family is `_combined` with one of four ways to make a task vector sparse; a way gives a `Kept` per model, or for
della, where each entry has a probability of its own, the sparse task vectors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from honeloom.errors import ConfigError
from honeloom.merging.engine.select import largest_each
from honeloom.merging.engine.sparse import elect_and_combine
from honeloom.merging.engine.sums import row_blocks, sums
from honeloom.merging.engine.tensors import Kept, Merged, Rule, SparseSum, Tensors, WeightedSum, each
from honeloom.merging.linear import weight_total
from honeloom.ops.noise import bernoulli, uniform

__all__ = [
    "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "share_of",
    "task_arithmetic", "ties",
]  # fmt: skip

Rescale = Literal["inverse", "l1", "none"]
PerModel = float | Sequence[float]


def share_of(share: float, count: int) -> int:
    """Number of entries that a share of some is: rounded down, and at least one of any."""
    return min(count, max(1, _floor(share * count)))


def _floor(number: float) -> int:
    """Rounded down, but for what float64 loses: 0.29 * 100 is 29."""
    nearest = round(number)
    return nearest if math.isclose(number, nearest, rel_tol=1e-15) else math.floor(number)


def _plan_task_arithmetic(tensors: Tensors, *, scale: float = 1.0, normalize: bool = False) -> Merged:
    """Base plus scale times the weighted sum of task vectors (model minus base).

    Parameters
    ----------
    tensors : Tensors
        K models and their base.
    scale : float
        The paper's lambda; 0 gives the base exactly.
    normalize : bool
        Divide by the sum of the weights.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        The weights sum to 0 and `normalize` is set, or no base.

    References
    ----------
    Ilharco et al. 2023, arXiv:2212.04089.
    """
    total = weight_total(tensors.weights) if normalize else 1.0
    return WeightedSum(tensors, tuple(scale * weight / total for weight in tensors.weights), from_base=True)


def _plan_ties(tensors: Tensors, *, density: PerModel = 0.2, scale: float = 1.0, normalize: bool = True) -> Merged:
    """Trim each task vector to its largest entries, elect a sign per entry, and average what agrees with it.

    Parameters
    ----------
    tensors : Tensors
        K models and their base.
    density : float, or one per model
        Share of each task vector's entries that is kept, rounded down, at least one; of entries of one size the
        first are kept.
    scale : float
        The paper's lambda.
    normalize : bool
        Divide each entry by the sum of the weights that agree there.

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
    Yadav et al. 2023, arXiv:2306.01708.
    """
    return _combined(tensors, _largest(tensors, density, 0.0), scale, normalize, elect=True)


def _breadcrumbs(elect: bool) -> Callable[..., Merged]:
    def plan(
        tensors: Tensors,
        *,
        density: PerModel = 0.14,
        gamma: PerModel = 0.01,
        scale: float = 1.0,
        normalize: bool = False,
    ) -> Merged:
        """Leave out the largest and the smallest entries of each task vector, and combine the rest.

        breadcrumbs adds them; breadcrumbs_ties elects a sign per entry first, and adds what agrees with it.

        Parameters
        ----------
        tensors : Tensors
            K models and their base.
        density : float, or one per model
            Share of each task vector's entries that is kept, rounded down, at least one.
        gamma : float, or one per model
            Share of the largest entries that is left out, rounded down; fewer where `density` needs them. Of entries
            of one size the first count as larger.
        scale : float
            Multiplier on the merged task vector.
        normalize : bool
            Divide by the sum of the weights; with signs elected, of those that agree.

        Returns
        -------
        callable
            Elements start..stop of the result, float64.

        Raises
        ------
        ConfigError
            The weights sum to 0 and `normalize` is set, or no base.

        References
        ----------
        Davari and Belilovsky 2024, arXiv:2312.06795.
        """
        return _combined(tensors, _largest(tensors, density, gamma), scale, normalize, elect)

    return plan


def _dare(elect: bool) -> Callable[..., Merged]:
    def plan(
        tensors: Tensors,
        *,
        density: PerModel = 0.5,
        scale: float = 1.0,
        normalize: bool = False,
        rescale: Rescale = "inverse",
    ) -> Merged:
        """Drop entries of the task vectors at random, rescale the others, and combine them.

        dare_linear adds them; dare_ties elects a sign per entry first, and adds what agrees with it.

        Parameters
        ----------
        tensors : Tensors
            K models and their base. `seed`, the tensor's name and the model's place decide what is dropped.
        density : float, or one per model
            Probability of an entry to be kept.
        scale : float
            Multiplier on the merged task vector.
        normalize : bool
            Divide by the sum of the weights; with signs elected, of those that agree.
        rescale : {"inverse", "l1", "none"}
            inverse divides by `density`, as the paper, which keeps the expectation; l1 keeps the sum of absolute values
            of a tensor, which is biased.

        Returns
        -------
        callable
            Elements start..stop of the result, float64.

        Raises
        ------
        ConfigError
            The weights sum to 0 and `normalize` is set, or no base.

        References
        ----------
        Yu et al. 2024, arXiv:2311.03099.
        """
        return _combined(tensors, _random(tensors, density, rescale), scale, normalize, elect)

    return plan


def _della(elect: bool, normal: bool) -> Callable[..., Merged]:
    def plan(
        tensors: Tensors,
        *,
        density: PerModel = 0.5,
        epsilon: PerModel = 0.1,
        scale: float = 1.0,
        normalize: bool = normal,
        rescale: Rescale = "inverse",
    ) -> Merged:
        """Drop small entries of the task vectors more often than large ones, rescale the others, and combine them.

        della elects a sign per entry and takes what agrees with it; della_linear adds all.

        Parameters
        ----------
        tensors : Tensors
            K models and their base. `seed`, the tensor's name and the model's place decide what is dropped.
        density : float, or one per model
            Mean probability of an entry to be kept; 1 keeps everything.
        epsilon : float, or one per model
            Probabilities go from density - epsilon for the smallest entry of a row (along the last dimension) to
            density + epsilon for the largest, evenly by rank; of entries of one size the first rank lower. In a row of
            one entry it is `density`.
        scale : float
            Multiplier on the merged task vector.
        normalize : bool
            Divide by the sum of the weights; with signs elected, of those that agree.
        rescale : {"inverse", "l1", "none"}
            inverse divides each entry by its probability, as the paper, which keeps the expectation; l1 keeps the sum
            of absolute values of a tensor, which is biased.

        Returns
        -------
        callable
            Elements start..stop of the result, float64.

        Raises
        ------
        ConfigError
            A probability would not lie in (0, 1]; the weights sum to 0 and `normalize` is set; or no base.

        References
        ----------
        Deep et al. 2024, arXiv:2406.11617.
        """
        densities, epsilons = each(density, len(tensors.models)), each(epsilon, len(tensors.models))
        return _combined(tensors, _by_rank(tensors, densities, epsilons, rescale), scale, normalize, elect)

    return plan


task_arithmetic = Rule(_plan_task_arithmetic, needs_base=True)
"""Base plus a weighted sum of task vectors."""
ties = Rule(_plan_ties, needs_base=True)
"""Trim each task vector, elect a sign per entry, average what agrees with it."""
breadcrumbs = Rule(_breadcrumbs(elect=False), needs_base=True)
"""Leave out the largest and the smallest entries of each task vector, add the rest."""
breadcrumbs_ties = Rule(_breadcrumbs(elect=True), needs_base=True)
"""Leave out the largest and the smallest entries of each task vector, elect signs."""
dare_linear = Rule(_dare(elect=False), needs_base=True)
"""Drop entries of the task vectors at random, rescale the rest, add."""
dare_ties = Rule(_dare(elect=True), needs_base=True)
"""Drop entries at random, rescale the rest, elect signs."""
della = Rule(_della(elect=True, normal=True), needs_base=True)
"""Drop small entries more often than large ones, rescale the rest, elect signs."""
della_linear = Rule(_della(elect=False, normal=False), needs_base=True)
"""Drop small entries more often than large ones, rescale the rest, add."""


def _combined(tensors: Tensors, kept: tuple[Kept, ...] | Merged, scale: float, normalize: bool, elect: bool) -> Merged:
    total = weight_total(tensors.weights) if normalize and not elect else 1.0
    if isinstance(kept, tuple):
        return SparseSum(tensors, kept, tensors.weights, scale, elect, normalize, total)
    weights = torch.tensor(tensors.weights, dtype=torch.float64)[:, None]

    def merged(start: int, stop: int) -> torch.Tensor:
        change = elect_and_combine(
            kept(start, stop) * weights, tensors.weights, elect=elect, normalize=normalize, total=total
        )
        return change.mul_(scale).add_(tensors.origin(start, stop))

    return merged


def _largest(tensors: Tensors, density: PerModel, gamma: PerModel) -> tuple[Kept, ...]:
    """The largest entries of each task vector, without the very largest where gamma is not 0."""
    count, models = tensors.count, len(tensors.models)
    kept = [share_of(share, count) for share in each(density, models)]
    shares = each(gamma, models)
    left_out = [min(_floor(g * count), count - k) for g, k in zip(shares, kept, strict=True)]
    cuts = largest_each(tensors, [(k + g, g) for k, g in zip(kept, left_out, strict=True)])
    return tuple(Kept(low, high if g else None) for (low, high), g in zip(cuts, left_out, strict=True))


def _stream(tensors: Tensors, model: int) -> str:
    return f"merge/{tensors.name}/{model}"


def _random(tensors: Tensors, density: PerModel, rescale: Rescale) -> tuple[Kept, ...]:
    probabilities = each(density, len(tensors.models))

    def sparse(start: int, stop: int) -> torch.Tensor:
        deltas = tensors.deltas(start, stop)
        for k, p in enumerate(probabilities):
            deltas[k].mul_(bernoulli(tensors.seed, _stream(tensors, k), p, stop - start, start=start))
        return deltas

    factors = [1.0 / p if rescale == "inverse" else 1.0 for p in probabilities]
    if rescale == "l1":
        factors = _restoring(tensors, sparse)
    return tuple(
        Kept(probability=p, stream=_stream(tensors, k), factor=f)
        for k, (p, f) in enumerate(zip(probabilities, factors, strict=True))
    )


def _restoring(tensors: Tensors, sparse: Merged) -> list[float]:
    """Factors with which sparse task vectors have the sum of absolute values that the full ones have."""
    models = len(tensors.models)

    def sizes(start: int, stop: int) -> torch.Tensor:
        return torch.cat([tensors.deltas(start, stop), sparse(start, stop)]).abs_()

    found = sums(sizes, 2 * models, row_blocks(tensors.count, tensors.columns))
    return [full / rest if rest else 1.0 for full, rest in zip(found[:models], found[models:], strict=True)]


def _by_rank(tensors: Tensors, densities: tuple[float, ...], epsilons: tuple[float, ...], rescale: Rescale) -> Merged:
    """Task vectors, (K, n), zero where an entry is dropped by a probability that its rank in its row decides."""
    for d, e in zip(densities, epsilons, strict=True):
        if d < 1 and (d - e <= 0 or d + e > 1):
            raise ConfigError(
                f"density {d:g} and epsilon {e:g}: probabilities from {d - e:g} to {d + e:g} must lie above 0 and at "
                f"most at 1; choose epsilon below {min(d, 1 - d):g}"
            )
    columns = max(1, tensors.columns)

    def sparse(start: int, stop: int) -> torch.Tensor:
        first, last = start - start % columns, min(tensors.count, stop + -stop % columns)
        deltas = tensors.deltas(first, last)
        for k, (d, e) in enumerate(zip(densities, epsilons, strict=True)):
            if d < 1:
                probability = _probabilities(deltas[k].view(-1, columns), d, e).view(-1)
                drawn = uniform(tensors.seed, _stream(tensors, k), last - first, start=first)
                delta = deltas[k] / probability if rescale == "inverse" else deltas[k]
                deltas[k] = torch.where(drawn < probability, delta, 0.0)
        return deltas[:, start - first : stop - first]

    if rescale != "l1":
        return sparse
    factors = torch.tensor(_restoring(tensors, sparse), dtype=torch.float64)[:, None]
    return lambda start, stop: sparse(start, stop) * factors


def _probabilities(deltas: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Of each entry of some rows, by its rank in the row."""
    rows, columns = deltas.shape
    if columns == 1:
        return torch.full_like(deltas, density)
    order = torch.argsort(deltas.abs(), dim=1, stable=True)
    steps = torch.arange(columns, dtype=torch.float64) * (2 * epsilon / (columns - 1)) + (density - epsilon)
    return torch.empty_like(deltas).scatter_(1, order, steps.expand(rows, columns))
