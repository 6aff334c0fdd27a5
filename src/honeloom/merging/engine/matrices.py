"""Methods that need a matrix as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from honeloom.merging.engine.tensors import Read, blocks

__all__ = ["Whole", "read_matrix"]

_ALONE = threading.Lock()


class Whole:
    """A result that is computed at the first request, and held in memory.

    Parameters
    ----------
    compute : callable
        Gives the whole result, float64. It runs with one thread, for the number of threads changes the bits of a
        matrix product, and never beside another one, which bounds the memory.
    """

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute
        self._result: torch.Tensor | None = None

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the flattened result."""
        with _ALONE:
            if self._result is None:
                with _one_thread():
                    self._result = self._compute().reshape(-1)
            return self._result[start:stop].clone()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_matrix(read: Read, rows: int, columns: int) -> torch.Tensor:
    """Read a whole matrix, (rows, columns) float64, block by block."""
    matrix = torch.empty(rows * columns, dtype=torch.float64)
    for start, stop in blocks(rows * columns):
        matrix[start:stop] = read(start, stop)
    return matrix.view(rows, columns)
