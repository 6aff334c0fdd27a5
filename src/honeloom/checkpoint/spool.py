"""Tensors put aside on the disk until the sizes of all of them are known."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

__all__ = ["Spool", "Spooled"]


@dataclass(frozen=True, slots=True)
class Spooled:
    """Where a tensor lies in the file."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Spool:
    """One file of raw tensors, written in turn and read back at random; removed at the end.

    Parameters
    ----------
    path : Path
        A new file; one that is left from a killed process is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb+")
        self._end = 0

    def put(self, tensor: torch.Tensor) -> Spooled:
        """Append a tensor."""
        flat = tensor.detach().cpu().contiguous()
        place = Spooled(self._end, flat.dtype, tuple(flat.shape))
        self._file.seek(self._end)
        self._file.write(flat.view(-1).view(torch.uint8).numpy().data)
        self._end += flat.numel() * flat.dtype.itemsize
        return place

    def get(self, place: Spooled) -> torch.Tensor:
        """Read a tensor back."""
        data = torch.empty(prod(place.shape), dtype=place.dtype)
        self._file.seek(place.start)
        count = self._file.readinto(data.view(torch.uint8).numpy().data)
        if count != data.numel() * data.dtype.itemsize:
            raise OSError(f"{self._path}: became shorter while it was read; is something else writing it?")
        return data.view(place.shape)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
