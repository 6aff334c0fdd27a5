"""Writing a model folder as a stream: headers from known shapes first, then the data piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from honeloom.checkpoint.dtypes import format_name
from honeloom.checkpoint.reader import INDEX_NAME, SINGLE_NAME

__all__ = ["SHARD_BYTES", "TensorStream", "write_checkpoint", "write_tensors"]

SHARD_BYTES = 5_000_000_000
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class TensorStream:
    """A tensor to write: what it is now, what it holds later.

    Attributes
    ----------
    chunks : callable
        Called once, when the tensor's turn comes; gives its elements in order, in pieces of
        any shape and of this dtype.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorStream:
        """A tensor that is in memory already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    tensors: Iterable[TensorStream],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = _METADATA,
) -> int:
    """Write `model.safetensors`, or shards with their index, as Hugging Face does.

    Equal inputs give equal bytes. Files are flushed to the disk; renaming the folder into place
    is the caller's part. Memory holds one chunk at a time.

    Parameters
    ----------
    folder : Path
        An existing folder.
    tensors : iterable of TensorStream
        What to write; within a file, wider dtypes come first so that all data is aligned.
    shard_bytes : int
        A new file begins where the data would pass this size; a larger tensor has its own.
    metadata : mapping
        Written into each header.

    Returns
    -------
    int
        Bytes of all weight files.

    Raises
    ------
    ValueError
        Two tensors have one name, or chunks do not fit the dtype and shape announced.
    """
    plan = list(tensors)
    if len({t.name for t in plan}) < len(plan):
        raise ValueError("two tensors to write have the same name")
    shards = _split(plan, shard_bytes)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, metadata)
    if len(shards) > 1:
        _write_index(folder / INDEX_NAME, dict(zip(names, shards, strict=True)))
    return sum((folder / name).stat().st_size for name in names)


def write_tensors(path: Path, tensors: Iterable[TensorStream], *, metadata: Mapping[str, str] = _METADATA) -> int:
    """Write one safetensors file as `write_checkpoint` does, under any name.

    Returns
    -------
    int
        Bytes of the file.
    """
    plan = list(tensors)
    if len({t.name for t in plan}) < len(plan):
        raise ValueError("two tensors to write have the same name")
    _write_file(path, sorted(plan, key=lambda t: -t.dtype.itemsize), metadata)
    return path.stat().st_size


def _split(plan: Sequence[TensorStream], shard_bytes: int) -> list[list[TensorStream]]:
    shards: list[list[TensorStream]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda t: -t.dtype.itemsize) for shard in shards]


def _write_file(path: Path, tensors: Sequence[TensorStream], metadata: Mapping[str, str]) -> None:
    with open(path, "wb") as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors:
            _write_tensor(file, tensor)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[TensorStream], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": format_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, tensor: TensorStream) -> None:
    left = prod(tensor.shape)
    for chunk in tensor.chunks():
        left -= chunk.numel()
        if chunk.dtype != tensor.dtype or left < 0:
            raise ValueError(
                f"{tensor.name!r}: a chunk of {chunk.numel()} {chunk.dtype} does not fit what was announced"
            )
        flat = chunk.detach().cpu().contiguous().view(-1)
        file.write(flat.view(torch.uint8).numpy().data)
    if left:
        raise ValueError(f"{tensor.name!r}: {left} elements fewer than its shape {tensor.shape} announces")


def _write_index(path: Path, files: Mapping[str, Sequence[TensorStream]]) -> None:
    tensors = [t for shard in files.values() for t in shard]
    index = {
        "metadata": {
            "total_parameters": sum(prod(t.shape) for t in tensors),
            "total_size": sum(t.nbytes for t in tensors),
        },
        "weight_map": {t.name: file for file, shard in files.items() for t in shard},
    }
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
