"""One tensor of every model, read by pieces, and what a method makes of it.

A method is written once, as a plan: from `Tensors` (what can be read) to a `Merged` (the result, element by
element, in float64). `Rule` also lets the same plan be called on tensors in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.errors import ConfigError

__all__ = [
    "BLOCK", "Bytes", "Cut", "Kept", "Merged", "Raw", "Read", "Rule", "SparseSum", "Tensors", "WeightedSum", "blocks",
    "each",
]  # fmt: skip

BLOCK = 1 << 16
"""Elements per partial sum of any statistic; fixed, so that neither chunks nor threads can change a bit."""

Read = Callable[[int, int], torch.Tensor]
"""Elements start..stop of a flattened tensor, float64; the caller may not change them."""
Merged = Callable[[int, int], torch.Tensor]
"""Elements start..stop of a flattened result, float64, for any range and in any order."""
Bytes = npt.NDArray[np.uint8]
"""Elements as they are stored, (n times their size,), contiguous."""
Raw = Callable[[int, int], tuple[Bytes | None, Sequence[Bytes | None], str | None, Sequence[str | None]]]
"""Elements start..stop of the base and of the K models as stored, and the types of these by their names in the file
format, "BF16" for example; None for both where there is no base or values are not simply stored."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """The same tensor of every model.

    Attributes
    ----------
    name : str
        Of the tensor in the result; with `seed` and a model's place it names random streams.
    shape : tuple of int
        Common to all.
    models : tuple of Read
        K models, in the order given by the user.
    weights : tuple of float
        K numbers.
    base : Read or None
        Origin of the task vectors.
    data : tuple of (Read or None)
        What a method with data knows of each model, for example a Fisher diagonal; else empty.
    seed : int
        For random methods.
    raw : Raw or None
        The same base and models as stored bytes, which the compiled kernels take where they can; same results, faster.
    cuts : tuple of dict
        For every model the cuts of its task vector that are known, by the number of entries chosen; more are added.
        Empty: none are kept.
    """

    name: str
    shape: tuple[int, ...]
    models: tuple[Read, ...]
    weights: tuple[float, ...]
    base: Read | None = None
    data: tuple[Read | None, ...] = ()
    seed: int = 0
    raw: Raw | None = None
    cuts: tuple[dict[int, Cut], ...] = ()

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension; of a vector, its length."""
        return self.shape[-1] if self.shape else 1

    @property
    def origin(self) -> Read:
        """The base, for methods that cannot do without."""
        if self.base is None:
            raise ConfigError("this method needs base_model: a task vector is a model minus its base")
        return self.base

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Models' elements, (K, n)."""
        return torch.stack([read(start, stop) for read in self.models])

    def deltas(self, start: int, stop: int) -> torch.Tensor:
        """Task vectors' elements, model minus base, (K, n)."""
        return self.values(start, stop) - self.origin(start, stop)


def blocks(count: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges of a fixed grid over `count` elements."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def each(value: float | Sequence[float], count: int) -> tuple[float, ...]:
    """A setting as one number per model: given once, or for each."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} models")
    return values


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """Sum of factor times model; with a base, base plus the sum of factor times task vector."""

    tensors: Tensors
    factors: tuple[float, ...]
    from_base: bool = False

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Products and sums are rounded one by one, in the order of the models."""
        origin = self.tensors.origin(start, stop) if self.from_base else None
        total = torch.zeros(stop - start, dtype=torch.float64)
        for read, factor in zip(self.tensors.models, self.factors, strict=True):
            values = read(start, stop)
            total += (values if origin is None else values - origin) * factor
        return total if origin is None else total.add_(origin)


@dataclass(frozen=True, slots=True)
class Cut:
    """A number of entries chosen by size: those above `value`, and those equal to it up to index `last`.

    `value` may be infinite (none) or -1 (all). Sizes are absolute values in float64. NaN, which only allowed inputs
    hold, counts as larger than all and is always chosen.
    """

    value: float
    last: int = -1

    def __call__(self, sizes: torch.Tensor, start: int) -> torch.Tensor:
        """Which of the entries start... are chosen; bool."""
        index = torch.arange(start, start + sizes.shape[-1])
        return ~(sizes <= self.value) | ((sizes == self.value) & (index <= self.last))


@dataclass(frozen=True, slots=True)
class Kept:
    """Which entries of a task vector count, and the factor on them.

    Attributes
    ----------
    low : Cut or None
        Only entries that it chooses.
    high : Cut or None
        Not the entries that it chooses.
    probability : float
        Each of them with this probability (1: all).
    stream : str
        Name of the random stream of `ops.noise.bernoulli`, with the seed of the tensors.
    factor : float
        On what is kept.
    """

    low: Cut | None = None
    high: Cut | None = None
    probability: float = 1.0
    stream: str = ""
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class SparseSum:
    """Base plus scale times the sum of sparse task vectors, with or without election of signs.

    Per entry, with d_k the task vector's entry times its factor where kept, else 0, and s_k = weight_k d_k:
    without election the sum of s_k, divided by `total` if that is given. With election the sign of the sum of all s_k
    (+ if it is 0), and the sum of those s_k that are not 0 and have that sign; with `normalize` divided by the sum of
    their weights (by 1 if that is 0).
    """

    tensors: Tensors
    kept: tuple[Kept, ...]
    weights: tuple[float, ...]
    scale: float = 1.0
    elect: bool = False
    normalize: bool = False
    total: float = 1.0

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """The reference that the compiled kernel equals to the bit."""
        from honeloom.merging.engine.sparse import sparse_sum

        return sparse_sum(self, start, stop)


@dataclass(frozen=True, slots=True)
class Rule:
    """A merge method: a plan for streams, callable on tensors in memory too.

    Attributes
    ----------
    plan : callable
        From `Tensors` and the method's settings to a `Merged`.
    needs_base : bool
        Whether a base model must be given.
    """

    plan: Callable[..., Merged]
    needs_base: bool = False

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float] | None = None,
        *,
        base: torch.Tensor | None = None,
        data: Sequence[torch.Tensor | None] = (),
        name: str = "",
        seed: int = 0,
        **settings: Any,
    ) -> torch.Tensor:
        """Merge the same tensor of K models.

        Parameters
        ----------
        tensors : sequence of Tensor
            K tensors of one shape, any floating type.
        weights : sequence of float, optional
            K numbers; 1 each by default.
        base : Tensor, optional
            The common ancestor's tensor.
        data : sequence of (Tensor or None)
            For methods with data, one per model.
        name, seed
            Of the random streams.
        **settings
            Of the method.

        Returns
        -------
        Tensor
            That shape, float64; the caller rounds once.

        Raises
        ------
        ConfigError
            The method has no answer for these weights, or lacks the base.
        """
        weights = (1.0,) * len(tensors) if weights is None else tuple(weights)
        if not tensors or len(tensors) != len(weights):
            raise ValueError(f"{len(tensors)} tensors and {len(weights)} weights; one weight per tensor is needed")
        group = Tensors(
            name,
            tuple(tensors[0].shape),
            tuple(map(_reader, tensors)),
            weights,
            _reader(base) if base is not None else None,
            tuple(_reader(d) if d is not None else None for d in data),
            seed,
        )
        return self.plan(group, **settings)(0, group.count).view(group.shape)


def _reader(tensor: torch.Tensor) -> Read:
    flat = tensor.reshape(-1)
    return lambda start, stop: flat[start:stop].double()
