"""Vectors of rows on disk: written once, block by block, and read as a memory map.

A number of rows that fills memory as vectors is ordinary, so nothing here holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from honeloom.errors import SourceError
from honeloom.runs.atomic import open_atomic, require_space

__all__ = ["BLOCK", "blocks_of", "inverse_lengths", "read_vectors", "stored_vectors", "unit_blocks"]

Vectors = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
BLOCK = 4096
"""Rows that are in memory at a time, and few enough for a block of scores to stay in the cache."""


def blocks_of(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Consecutive slices that cover `count` rows."""
    return (slice(start, min(count, start + size)) for start in range(0, count, size))


def inverse_lengths(vectors: Vectors) -> npt.NDArray[np.float32]:
    """What to multiply every row by to give it length 1, (N,); 0 for a zero row and one that is not finite."""
    found = np.zeros(len(vectors), dtype=np.float32)
    for part in blocks_of(len(vectors)):
        lengths = np.linalg.norm(np.asarray(vectors[part], dtype=np.float64), axis=1)
        usable = np.isfinite(lengths) & (lengths > 0)
        found[part][usable] = 1.0 / lengths[usable]
    return found


def unit_blocks(vectors: Vectors, *, standardise: bool) -> Iterator[Vectors]:
    """Yield the rows of (N, d) with length 1, a block at a time; a row that is not finite, or zero, becomes zero.

    With `standardise` every dimension is first shifted and scaled to mean 0 and variance 1 over
    the finite rows.
    """
    mean, spread = _moments(vectors) if standardise else (0.0, 1.0)
    for part in blocks_of(len(vectors)):
        rows = (np.asarray(vectors[part], dtype=np.float64) - mean) / spread
        lengths = np.linalg.norm(rows, axis=1)
        usable = np.isfinite(lengths) & (lengths > 0)
        scaled = np.zeros(rows.shape, dtype=np.float32)
        scaled[usable] = rows[usable] / lengths[usable, None]
        yield scaled


def _moments(vectors: Vectors) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of every dimension over the finite rows; a constant one gets 1."""
    count, total, squares = 0, np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1])
    for part in blocks_of(len(vectors)):
        rows = np.asarray(vectors[part], dtype=np.float64)
        rows = rows[np.isfinite(rows).all(axis=1)]
        count, total, squares = count + len(rows), total + rows.sum(axis=0), squares + (rows**2).sum(axis=0)
    mean = total / max(count, 1)
    variance = np.maximum(squares / max(count, 1) - mean**2, 0.0)
    return mean, np.sqrt(np.where(variance > 1e-12 * (1 + mean**2), variance, 1.0))


def stored_vectors(path: Path, blocks: Iterable[Array], n: int) -> Vectors:
    """Write vectors into a .npy file, which is complete or not there, and open it as a read-only memory map.

    Parameters
    ----------
    path : Path
        The file; one that exists is replaced.
    blocks : iterable of array (m, d)
        The vectors in the rows' order, written as float32.
    n : int
        How many rows the blocks hold together; at least 1.

    Returns
    -------
    memory map (n, d), float32

    Raises
    ------
    ValueError
        The blocks hold another number of rows, or differ in d.
    OutOfSpaceError
        The disk has no room for the file.
    """
    with open_atomic(path) as file:
        _write(file, path, blocks, n)
    return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


def _write(file: BinaryIO, path: Path, blocks: Iterable[Array], n: int) -> None:
    written, size = 0, 0
    for block in blocks:
        rows = np.ascontiguousarray(block, dtype="<f4")
        if rows.ndim != 2 or (size and rows.shape[1] != size):
            raise ValueError(f"{path.name}: a block of shape {rows.shape}, expected (rows, {size or 'length'})")
        if not size:
            size = rows.shape[1]
            require_space(path.parent, 4 * n * size)
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, size)})
        file.write(rows.data)
        written += len(rows)
    if not size or written != n:
        raise ValueError(f"{path.name}: {written} vectors for {n} rows")


def read_vectors(path: Path, n: int, *, warn: Callable[[str], None]) -> Vectors:
    """Open a user's .npy file of vectors as a read-only memory map, and check it in blocks.

    Parameters
    ----------
    path : Path
        An array (n, d) of float16, float32 or float64; it keeps its type.
    n : int
        The number of rows it must have.
    warn : callable
        Told how many rows hold a number that is not finite: these rows have no vector.

    Returns
    -------
    memory map (n, d)

    Raises
    ------
    SourceError
        The file cannot be read, is no such array, or no row of it is finite.
    """
    found = _open(path)
    if found.ndim != 2 or found.dtype.kind != "f" or found.dtype.itemsize > 8:
        raise SourceError(
            f"{path}: an array of shape {found.shape} and type {found.dtype}, expected (rows, length) of "
            "float16, float32 or float64; save one row of numbers per row"
        )
    if len(found) != n:
        raise SourceError(
            f"{path}: {len(found)} vectors for {n} usable rows; give one per usable row in reading order "
            "(rows that are rejected, duplicates among them, have none)"
        )
    broken = sum(int((~np.isfinite(found[part]).all(axis=1)).sum()) for part in blocks_of(n))
    if broken == n:
        raise SourceError(f"{path}: every one of the {n} vectors holds NaN or infinite numbers; make them again")
    if broken:
        warn(f"{path}: {broken} of {n} vectors hold NaN or infinite numbers; their rows count as having none")
    return found


def _open(path: Path) -> Array:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        why = "it is no plain array" if "pickle" in why else why  # numpy advises to allow pickles
        raise SourceError(f"{path}: not a readable .npy file ({why}); write it with numpy.save") from None
    if not isinstance(found, np.ndarray):
        raise SourceError(f"{path}: an archive of several arrays (.npz), expected one array; write it with numpy.save")
    return found
