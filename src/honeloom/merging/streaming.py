"""One merge as a stream: tensor after tensor, piece after piece, rounded once on the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from honeloom.checkpoint.dtypes import FLOAT_DTYPES, torch_dtype
from honeloom.checkpoint.writer import TensorStream
from honeloom.errors import IncompatibleModelsError, NotFiniteError
from honeloom.merging.config import LinearConfig, MergeMethod, SlerpConfig
from honeloom.merging.linear import linear, weighted_sum
from honeloom.merging.slerp import slerp_weights
from honeloom.merging.sources import ModelSource
from honeloom.merging.task_arithmetic import task_arithmetic
from honeloom.ops.rounding import round_once

__all__ = ["CHUNK", "Merger"]

CHUNK = 1 << 18
"""Elements per piece: small enough for the cache, large enough for the disk."""


@dataclass(slots=True)
class Merger:
    """The models of a merge and how they combine.

    Attributes
    ----------
    method : MergeMethod
        Name and settings.
    models, weights : sequence
        What is merged; slerp takes exactly two models, its t = 0 end first.
    base : ModelSource or None
        Origin of the task vectors.
    donor : ModelSource
        Gives names, order and types of the tensors.
    dtype : torch.dtype or None
        Of the result's floating tensors; None keeps the donor's, tensor by tensor.
    allow_nan : bool
        Write NaN and infinity if they come up.
    chunk : int
        Elements per piece; changes no bit of the result.
    lost, elements : int
        Counted while streaming: elements that the merge moves away from the base and the
        output type rounds back to it, and all floating elements.
    """

    method: MergeMethod
    models: Sequence[ModelSource]
    weights: Sequence[float]
    base: ModelSource | None
    donor: ModelSource
    dtype: torch.dtype | None = None
    allow_nan: bool = False
    chunk: int = CHUNK
    lost: int = field(default=0, init=False)
    elements: int = field(default=0, init=False)

    @property
    def lost_delta_fraction(self) -> float:
        """Share of elements whose change is lost to the output type; 0 without a base."""
        return self.lost / self.elements if self.elements else 0.0

    def streams(self) -> list[TensorStream]:
        """Every tensor of the result, in the donor's file order; nothing is read yet."""
        return [
            TensorStream(name, self.output_dtype(name), info.shape, partial(self._chunks, name))
            for name, info in self.donor.tensors.items()
        ]

    def output_dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the result."""
        info = self.donor.info(name)
        return self.dtype if self.dtype and info.dtype in FLOAT_DTYPES else torch_dtype(info.dtype)

    def _chunks(self, name: str) -> Iterator[torch.Tensor]:
        if self.donor.info(name).dtype not in FLOAT_DTYPES:
            yield from self._copy(name)
            return
        dtype = self.output_dtype(name)
        combine = self._combiner(name)
        for start, stop in self._pieces(name):
            origin = self.base.read(name, start, stop) if self.base else None
            merged = combine(start, stop, origin)
            rounded = round_once(merged, dtype)
            if not self.allow_nan and not bool(torch.isfinite(rounded).all()):
                raise NotFiniteError(
                    f"the merged tensor {name!r} has values beyond the range of {dtype}; choose dtype: fp32 or bf16"
                )
            if origin is not None:
                self.lost += int(((merged != origin) & (rounded == round_once(origin, dtype))).sum())
                self.elements += len(merged)
            yield rounded

    def _pieces(self, name: str) -> Iterator[tuple[int, int]]:
        count = self.donor.info(name).elements
        for start in range(0, count, self.chunk):
            yield start, min(start + self.chunk, count)

    def _copy(self, name: str) -> Iterator[torch.Tensor]:
        """Integers and codes have no average: they pass if all models agree."""
        for start, stop in self._pieces(name):
            piece = self.donor.stored(name, start, stop)
            for model in self.models:
                if not _same_bytes(piece, model.stored(name, start, stop)):
                    raise IncompatibleModelsError(
                        f"cannot merge {self.donor.name} with {model.name}: {name!r} is {self.donor.info(name).dtype}, "
                        "which cannot be averaged, and its values differ"
                    )
            yield piece

    def _combiner(self, name: str) -> Callable[[int, int, torch.Tensor | None], torch.Tensor]:
        """The method as a function of a range, with what it needs to know of the whole tensor."""

        def read(start: int, stop: int, origin: torch.Tensor | None) -> list[torch.Tensor]:
            return [origin if m is self.base and origin is not None else m.read(name, start, stop) for m in self.models]

        method = self.method
        if isinstance(method, SlerpConfig):
            a, b = (partial(model.read, name) for model in self.models)
            weights = slerp_weights(a, b, self.donor.info(name).elements, t=method.t)
            return lambda start, stop, origin: weighted_sum(read(start, stop, origin), weights)
        if isinstance(method, LinearConfig):
            normalize = method.normalize
            return lambda start, stop, origin: linear(read(start, stop, origin), self.weights, normalize=normalize)
        settings = method.model_dump(exclude={"type"})

        def add_task_vectors(start: int, stop: int, origin: torch.Tensor | None) -> torch.Tensor:
            assert origin is not None  # MergeConfig requires base_model for this method
            return task_arithmetic(origin, read(start, stop, origin), self.weights, **settings)

        return add_task_vectors


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
