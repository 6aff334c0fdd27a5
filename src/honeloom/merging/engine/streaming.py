"""One merge as a stream: tensor after tensor, piece after piece, rounded once on the way out."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from honeloom.checkpoint.dtypes import FLOAT8_DTYPES, FLOAT_DTYPES, torch_dtype
from honeloom.checkpoint.headers import DTYPE_BITS
from honeloom.checkpoint.writer import TensorStream
from honeloom.config.methods import MethodConfig
from honeloom.errors import ConfigError, IncompatibleModelsError, NotFiniteError
from honeloom.merging.config import MergeMethodConfig, keeps_equal, plan_settings
from honeloom.merging.engine.chunks import Chunk, merge_chunk, prepared_chunk
from honeloom.merging.engine.layout import Part
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.tensors import BLOCK, Bytes, Cut, Merged, Read, Rule, Tensors
from honeloom.ops.noise import uniform
from honeloom.ops.rounding import round_stochastically
from honeloom.registry import family

__all__ = ["CHUNK", "COMPUTED", "Merger", "Rows", "chunk_elements"]

CHUNK = 1 << 18
"""Elements per piece where memory is not short: a few MB of each model."""

_COMPARED = 1 << 16
_SLACK = 16 << 20
_STATISTICS = 5 << 20
"""Bytes per model of histograms, and of the entries among which a limit is looked for."""
_ELEMENT = 20
"""Bytes per element of a piece and model: as stored, and blocks of it in float64 on the plain path."""
COMPUTED = FLOAT_DTYPES | FLOAT8_DTYPES
"""Types that are merged; other tensors are only copied."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor with a row per token, with the rows of each model in the order of the result's vocabulary."""

    shape: tuple[int, ...]
    models: tuple[Read, ...]
    base: Read | None = None


@dataclass(slots=True)
class Merger:
    """The models of a merge and how they combine.

    Attributes
    ----------
    method : MethodConfig
        Name and settings.
    rule : Rule, or a function of tensors, weights and base
        The method itself.
    parts : sequence of Part
        The tensors of the result.
    sources : mapping
        Models by their place in the configuration.
    base, donor : ModelSource
        Origin of the task vectors (or None); giver of names, order and types.
    dtype : torch.dtype or None
        Of the result's floating tensors; None keeps the donor's, tensor by tensor.
    default_dtype : torch.dtype
        Of tensors that are stored in 8 bits.
    rows : mapping
        Tensors whose rows are re-ordered, by name.
    data : mapping
        What was measured of each model, for methods with data: place -> tensor's name -> Read.
    rounding : {"nearest", "stochastic"}
        How float64 becomes the output type.
    allow_nan : bool
        Write NaN and infinity if they come up.
    seed, chunk : int
        Of random methods; elements per piece, which changes no bit of the result.
    threads : int
        How many tensors are computed at a time.
    counts : dict
        Filled while streaming: tensor -> elements that the merge moves away from the base and the
        output type rounds back to it, and all elements that have a base.
    cuts : dict or None
        What one merge found of the sizes of task vectors, for the next of the same models; None keeps nothing.
    """

    method: MethodConfig
    rule: Rule | Callable[..., torch.Tensor]
    parts: Sequence[Part]
    sources: Mapping[str, ModelSource]
    base: ModelSource | None
    donor: ModelSource
    dtype: torch.dtype | None = None
    default_dtype: torch.dtype = torch.bfloat16
    rows: Mapping[str, Rows] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Read]] = field(default_factory=dict)
    rounding: Literal["nearest", "stochastic"] = "nearest"
    allow_nan: bool = False
    seed: int = 0
    chunk: int = CHUNK
    threads: int = 1
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    cuts: dict[tuple[str, str, str, str], dict[int, Cut]] | None = None
    _rooms: threading.local = field(default_factory=threading.local, init=False, repr=False)

    @classmethod
    def of(
        cls,
        method: MethodConfig,
        models: Sequence[ModelSource],
        weights: Sequence[float],
        base: ModelSource,
        dtype: torch.dtype | None = None,
    ) -> Merger:
        """Whole models with fixed weights on a base, which is also the donor."""
        sources = {f"models.{i}": model for i, model in enumerate(models)}
        settings = plan_settings(method)
        parts = [
            Part(name, info, tuple((place, name) for place in sources), tuple(weights), name, settings)
            for name, info in base.tensors.items()
        ]
        return cls(method, family("merging").load(method.type), parts, sources, base, base, dtype)

    @property
    def lost_delta_fraction(self) -> float:
        """Share of elements whose change is lost to the output type; 0 without a base."""
        lost, elements = (sum(c[i] for c in self.counts.values()) for i in (0, 1))
        return lost / elements if elements else 0.0

    @property
    def bytes_in(self) -> int:
        """Bytes of the stored tensors that the result is made of, each counted once for every model and part."""
        members = [model.info(name) for part in self.parts for model, name in self._members(part)]
        return sum(info.elements * DTYPE_BITS[info.dtype] // 8 for info in members)

    def streams(self) -> list[TensorStream]:
        """Every tensor of the result, in order; nothing is read yet."""
        return [
            TensorStream(
                p.name, self.output_dtype(p), self.shape(p), partial(self._chunks, p), partial(self._as_it_is, p)
            )
            for p in self.parts
        ]

    def shape(self, part: Part) -> tuple[int, ...]:
        """Shape of a tensor in the result."""
        return self.rows[part.name].shape if part.name in self.rows else part.info.shape

    def output_dtype(self, part: Part) -> torch.dtype:
        """Type of a tensor in the result."""
        if part.info.dtype in FLOAT8_DTYPES:
            return self.dtype or self.default_dtype
        return self.dtype if self.dtype and part.info.dtype in FLOAT_DTYPES else torch_dtype(part.info.dtype)

    def tensors(self, part: Part, *, raw: bool = True) -> Tensors:
        """What can be read of a part; without `raw` by the plain path alone."""
        shape = self.shape(part)
        data = tuple(self.data.get(place, {}).get(name) for place, name in part.models) if self.data else ()
        if part.name in self.rows:
            rows = self.rows[part.name]
            return Tensors(part.name, shape, rows.models, part.weights, rows.base, data, self.seed)
        reads = tuple(partial(self.sources[place].read, name) for place, name in part.models)
        base = partial(self.base.read, part.base) if self.base and part.base else None
        stored = partial(self._raw, part) if raw else None
        return Tensors(part.name, shape, reads, part.weights, base, data, self.seed, stored, self._cuts(part))

    def _cuts(self, part: Part) -> tuple[dict[int, Cut], ...]:
        """Known cuts of each model's task vector."""
        if self.cuts is None or not (self.base and part.base):
            return ()
        origin = self.base.name, part.base
        return tuple(self.cuts.setdefault((self.sources[p].name, n, *origin), {}) for p, n in part.models)

    def plan(self, part: Part, *, raw: bool = True) -> tuple[Merged, Tensors]:
        """The method's result for a part, not yet computed, and what it reads."""
        tensors = self.tensors(part, raw=raw)
        if isinstance(self.rule, Rule):
            return self.rule.plan(tensors, **part.settings), tensors
        return _Called(self.rule, tensors, part.settings), tensors

    def _members(self, part: Part) -> list[tuple[ModelSource, str]]:
        """Every model behind a part and the tensor's name in it, the base included."""
        found = [(self.sources[place], name) for place, name in part.models]
        return [*found, (self.base, part.base)] if self.base and part.base else found

    def _as_it_is(self, part: Part) -> tuple[Path, int] | None:
        """Where the result lies already: all models hold the same bytes, and the method keeps equal tensors."""
        members = self._members(part)
        model, name = members[0]
        kind = part.info.dtype
        self.counts[part.name] = (0, part.info.elements if part.base and kind in COMPUTED else 0)
        if part.name in self.rows or kind == "F64" or not all(m.is_stored(n) for m, n in members):
            return None
        if kind in COMPUTED and not keeps_equal(self.method, part.settings):
            return None
        if any(m.info(n).dtype != kind for m, n in members) or torch_dtype(kind) != self.output_dtype(part):
            return None
        if len({m.place(n) for m, n in members}) > 1 and not self._equal(members, part.info.elements):
            return None
        if kind in COMPUTED and not self.allow_nan:
            for start, stop in self._pieces(part):
                model.read(name, start, stop)  # refuses NaN
        return model.place(name)

    def _equal(self, members: Sequence[tuple[ModelSource, str]], count: int) -> bool:
        (first, name), *others = members
        for start in range(0, count, _COMPARED):
            stop = min(start + _COMPARED, count)
            piece = first.stored_bytes(name, start, stop).tobytes()
            if any(m.stored_bytes(n, start, stop).tobytes() != piece for m, n in others):
                return False
        return True

    def _raw(
        self, part: Part, start: int, stop: int
    ) -> tuple[Bytes | None, Sequence[Bytes | None], str | None, Sequence[str | None]]:
        """Bytes of every model where its values are simply stored; the next call of this thread overwrites them."""
        found: list[tuple[Bytes | None, str | None]] = []
        for number, (source, name) in enumerate(self._members(part)):
            if source.is_stored(name):
                kind = source.info(name).dtype
                room = self._room(number, (stop - start) * torch_dtype(kind).itemsize)
                found.append((source.read_raw(name, start, stop, room), kind))
            else:
                found.append((None, None))
        base = found.pop() if self.base and part.base else (None, None)
        return base[0], [data for data, _ in found], base[1], [kind for _, kind in found]

    def _room(self, number: int, size: int) -> Bytes:
        """A buffer of this thread for one model, used again: new memory would be cleared page by page."""
        rooms: dict[str, Bytes] = self._rooms.__dict__
        key = f"model {number}"
        if key not in rooms or len(rooms[key]) < size:
            rooms[key] = np.empty(size, dtype=np.uint8)
        return rooms[key]

    def fill(self, places: Sequence[tuple[Part, torch.Tensor]]) -> None:
        """Compute tensors into memory: every value is rounded to the output type first, as in `streams`.

        Parameters
        ----------
        places : sequence of (Part, Tensor)
            Some of `parts`, and where each goes: (n,), contiguous, any type and device. The sources must give stored
            bytes that stay, such as those of a mapped file.
        """
        ready: list[tuple[Part, torch.dtype, Callable[[], Chunk]]] = []
        for part, out in places:
            if part.info.dtype not in COMPUTED or self.rounding == "stochastic" or out.device.type != "cpu":
                start = 0
                for values in self._chunks(part):
                    out[start : start + values.numel()].copy_(values.reshape(-1))
                    start += values.numel()
                continue
            (merged, tensors), dtype = self.plan(part), self.output_dtype(part)
            for start, stop in self._pieces(part):
                run = prepared_chunk(merged, tensors, start, stop, dtype, out[start:stop], counted=False)
                ready.append((part, dtype, run))
        for part, dtype, run in ready:
            self._check(part, run(), dtype)

    def _chunks(self, part: Part) -> Iterator[torch.Tensor]:
        if part.info.dtype not in COMPUTED:
            yield from self._copy(part)
            return
        merged, tensors = self.plan(part)
        dtype, lost = self.output_dtype(part), 0
        for start, stop in self._pieces(part):
            if self.rounding == "stochastic":
                chunk = _stochastic(merged, tensors, start, stop, dtype)
            else:
                chunk = merge_chunk(merged, tensors, start, stop, dtype)
            self._check(part, chunk, dtype)
            lost += chunk.lost
            yield chunk.values
        self.counts[part.name] = (lost, tensors.count if tensors.base is not None else 0)

    def _check(self, part: Part, chunk: Chunk, dtype: torch.dtype) -> None:
        if self.allow_nan:
            return
        if chunk.damaged is not None:
            model, element = chunk.damaged
            source, name = self._members(part)[model]
            raise source.not_finite(name, element)
        if chunk.beyond is not None:
            raise NotFiniteError(
                f"the merged tensor {part.name!r} has values beyond the range of {dtype}; choose dtype: fp32 or bf16"
            )

    def _pieces(self, part: Part) -> Iterator[tuple[int, int]]:
        count = prod(self.shape(part))
        for start in range(0, count, self.chunk):
            yield start, min(start + self.chunk, count)

    def _copy(self, part: Part) -> Iterator[torch.Tensor]:
        """Integers and codes have no average: they pass if all models agree."""
        members = self._members(part)
        source = members[0][0]
        for other, name in members[1:]:
            kind = other.info(name).dtype
            if kind != part.info.dtype or not self._equal([members[0], (other, name)], part.info.elements):
                what = "its values differ" if kind == part.info.dtype else f"{kind} in the other"
                raise IncompatibleModelsError(
                    f"cannot merge {source.name} with {other.name}: {part.name!r} is {part.info.dtype}, "
                    f"which cannot be averaged, and {what}"
                )
        for start, stop in self._pieces(part):
            yield source.stored(members[0][1], start, stop)


@dataclass(slots=True)
class _Called:
    """The result of a plain function of whole tensors, as plug-ins are."""

    function: Callable[..., torch.Tensor]
    tensors: Tensors
    settings: Mapping[str, Any]
    _result: torch.Tensor | None = None

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        if self._result is None:
            t = self.tensors
            models = [read(0, t.count).view(t.shape) for read in t.models]
            given = dict(self.settings)
            if "base" in inspect.signature(self.function).parameters:
                given["base"] = None if t.base is None else t.base(0, t.count).view(t.shape)
            self._result = self.function(models, t.weights, **given).double().reshape(-1)
        return self._result[start:stop]


def _stochastic(merged: Merged, tensors: Tensors, start: int, stop: int, dtype: torch.dtype) -> Chunk:
    values, lost = merged(start, stop), 0
    chances = uniform(tensors.seed, f"merge/rounding/{tensors.name}", stop - start, start=start)
    rounded = round_stochastically(values, dtype, chances)
    if tensors.base is not None:
        origin = tensors.base(start, stop)
        lost = int(((values != origin) & (rounded.double() == origin)).sum())
    wrong = (~torch.isfinite(rounded)).nonzero()
    return Chunk(rounded, lost, None, start + int(wrong[0]) if len(wrong) else None)


def chunk_elements(
    parts: Sequence[Part], method: MethodConfig, *, budget: int | None, resident: int, threads: int, after: int = 0
) -> tuple[int, int]:
    """Elements per piece, and threads, that stay within a budget.

    Parameters
    ----------
    parts : sequence of Part
        What is computed.
    method : MethodConfig
        Some compute a matrix as a whole.
    budget : int or None
        Bytes of memory of the process at most; None for no limit.
    resident : int
        Bytes that it has already.
    threads : int
        How many there may be.
    after : int
        Bytes that the check of the result takes once everything is written.

    Raises
    ------
    ConfigError
        The budget is too small; the message names the least that will do.
    """
    if budget is None:
        return CHUNK, threads
    widest = max(len(p.models) + 2 for p in parts)
    fixed = _whole_bytes(parts, method) + _SLACK + widest * _STATISTICS
    least = resident + max(after, fixed + _ELEMENT * widest * BLOCK)
    for crew in range(threads if budget >= least else 0, 0, -1):
        each = (budget - resident) // crew - fixed
        chunk = min(CHUNK, each // (_ELEMENT * widest) // BLOCK * BLOCK)
        if chunk >= BLOCK:
            return chunk, crew
    raise ConfigError(
        f"max_memory {budget:,}: merging these models takes at least {least:,} bytes "
        f"({resident:,} are taken before the first tensor is read)"
    )


def _whole_bytes(parts: Sequence[Part], method: MethodConfig) -> int:
    """Memory of the largest matrix that is computed as a whole, with the copies its decomposition makes."""
    if isinstance(method, MergeMethodConfig) and not method.whole:
        return 0
    return max(8 * p.info.elements * (2 * len(p.models) + 3) for p in parts)
