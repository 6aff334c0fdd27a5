"""Sums over a tensor, its rows or its columns, whose bits no chunk and no thread count can change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from honeloom.merging.engine.tensors import BLOCK, Read, Tensors, blocks

__all__ = ["Array", "row_blocks", "sums", "vector_grams", "vectors_along"]

Array = npt.NDArray[np.float64]
Along = Literal["row", "column"]


def sums(terms: Read, series: int, ranges: Iterable[tuple[int, int]]) -> list[float]:
    """Sums of several series.

    Parameters
    ----------
    terms : callable
        From start and stop to the terms there, (series, n) float64.
    series : int
        How many.
    ranges : iterable of (int, int)
        A fixed grid, such as `blocks` or `row_blocks`.

    Returns
    -------
    list of float
        numpy adds a block pairwise and in one thread; the blocks are added exactly, and rounded once.
    """
    parts = [terms(start, stop).contiguous().numpy().sum(axis=1).tolist() for start, stop in ranges]
    return [_total([part[i] for part in parts]) for i in range(series)]


def _total(parts: list[float]) -> float:
    """Exact sum, rounded once; NaN and infinity (allowed inputs may hold them) pass through."""
    return math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)


def row_blocks(count: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of a fixed grid of whole rows, about a block each."""
    return blocks(count, max(1, BLOCK // max(1, columns)) * columns) if count else iter(())


def vectors_along(tensors: Tensors, along: Along) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix.

    Along rows a vector runs over the last dimension, along columns over the first; a tensor of one dimension is one
    vector either way.
    """
    if along == "row":
        return tensors.count // max(1, tensors.columns), tensors.columns
    first = tensors.shape[0] if tensors.shape else 1
    return first, tensors.count // max(1, first)


def vector_grams(tensors: Tensors, along: Along, *, deltas: bool) -> Array:
    """Dot products of the models' rows, or columns, with each other.

    Parameters
    ----------
    tensors : Tensors
        K models.
    along : {"row", "column"}
        As in `vectors_along`.
    deltas : bool
        Of task vectors instead of models.

    Returns
    -------
    ndarray
        (vectors, K, K), float64.
    """
    read = tensors.deltas if deltas else tensors.values
    rows, columns = vectors_along(tensors, along)
    models = len(tensors.models)
    grams = np.zeros((rows if along == "row" else columns, models, models))
    for start, stop in row_blocks(tensors.count, columns):
        block = read(start, stop).contiguous().numpy().reshape(models, -1, columns)
        here = slice(start // columns, stop // columns) if along == "row" else slice(None)
        for i in range(models):
            for j in range(i, models):
                grams[here, i, j] += (block[i] * block[j]).sum(axis=1 if along == "row" else 0)
                grams[here, j, i] = grams[here, i, j]
    return grams
