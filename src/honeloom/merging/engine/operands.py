"""Elements of a range of every model as bytes, which the compiled kernels read."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.merging.engine.tensors import BLOCK, Bytes, Read, Tensors

__all__ = ["ITEM_SIZES", "KINDS", "Operands", "float64_operands", "kernels", "operands"]

KINDS = {"F64": 0, "F32": 1, "BF16": 2, "F16": 3, "F8_E4M3": 4, "F8_E5M2": 5}
"""The file format's names of the types that kernels read, and the kernels' numbers for them."""
ITEM_SIZES = (8, 4, 2, 2, 1, 1)
"""Bytes per element, by that number."""
_VIEWS = tuple(np.dtype(f"u{size}") for size in ITEM_SIZES)
_Stored = tuple[Bytes, int]


@cache
def kernels(name: str) -> Any:
    """A module of kernels; numba is imported when a tensor is read and not before."""
    return importlib.import_module(f"honeloom.merging.engine.{name}")


@dataclass(frozen=True, slots=True)
class Operands:
    """One range of every model, and of the base where there is one.

    Attributes
    ----------
    count : int
        Elements.
    models : tuple of ndarray
        K times bytes, uint8, contiguous and aligned; kept alive here while a kernel reads them by address.
    kinds : tuple of int
        K values of `KINDS`.
    base : ndarray or None
        Likewise.
    base_kind : int
        Of the base.
    """

    count: int
    models: tuple[Bytes, ...]
    kinds: tuple[int, ...]
    base: Bytes | None = None
    base_kind: int = 0

    @property
    def arguments(self) -> tuple[int, int, int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """How every kernel's call begins: elements, the base (address, or 0, and kind), and the models (likewise)."""
        where = np.array([model.ctypes.data for model in self.models], np.int64)
        base = 0 if self.base is None else self.base.ctypes.data
        return self.count, base, self.base_kind, where, np.array(self.kinds, np.int64)


def operands(tensors: Tensors, start: int, stop: int, base: Read | None) -> Iterator[tuple[int, Operands]]:
    """Elements start..stop of all models: at once where the stored bytes are all there is to know, else by blocks.

    Parameters
    ----------
    tensors : Tensors
        What is not in its `raw` is read as float64.
    start, stop : int
        Range of the flattened tensor.
    base : Read or None
        That of the tensors, or None to leave it out.

    Yields
    ------
    (int, Operands)
        Index of the first element, and the elements from there on.
    """
    origin, stored = _stored(tensors, start, stop)
    whole = (base is None or origin is not None) and all(known is not None for known in stored)
    step = max(1, stop - start) if whole else BLOCK
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        parts = [_part(*pair, start, begin, end) for pair in zip(tensors.models, stored, strict=True)]
        origin_part = _part(base, origin, start, begin, end) if base else (None, 0)
        yield begin, Operands(end - begin, tuple(d for d, _ in parts), tuple(k for _, k in parts), *origin_part)


def float64_operands(values: torch.Tensor) -> Operands:
    """Numbers that are there already, (n,), as the only model."""
    return Operands(len(values), (_bytes(values),), (KINDS["F64"],))


def _stored(tensors: Tensors, start: int, stop: int) -> tuple[_Stored | None, list[_Stored | None]]:
    """Bytes and kinds of the base and the models, None where there are none that a kernel reads."""
    if tensors.raw is None:
        return None, [None] * len(tensors.models)
    base, models, base_kind, kinds = tensors.raw(start, stop)
    known = [
        None if data is None or kind not in KINDS else (data, KINDS[kind])
        for data, kind in zip((base, *models), (base_kind, *kinds), strict=True)
    ]
    return known[0], known[1:]


def _part(read: Read, stored: _Stored | None, start: int, begin: int, end: int) -> _Stored:
    if stored is None:
        return _bytes(read(begin, end)), KINDS["F64"]
    data, kind = stored
    size = ITEM_SIZES[kind]
    part = data[(begin - start) * size : (end - start) * size]
    if len(part) != (end - begin) * size:
        raise ValueError(f"{len(part)} bytes for {end - begin} elements of {size} bytes each")
    return (part if part.flags.c_contiguous and part.view(_VIEWS[kind]).flags.aligned else part.copy()), kind


def _bytes(values: torch.Tensor) -> Bytes:
    data: Bytes = values.to(torch.float64).contiguous().numpy().view(np.uint8)
    return data
