"""Reading a model folder tensor by tensor; nothing is in memory that was not asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from honeloom.checkpoint.dtypes import torch_dtype
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.headers import Header, TensorInfo, read_header
from honeloom.errors import CheckpointError
from honeloom.registry import suggest

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "weight_files"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_INDEX_BYTES = 100_000_000


class Checkpoint:
    """The weights of a model folder, read lazily from one file or from shards.

    Reads copy exactly the bytes asked for, so what stays resident is what the caller keeps.
    `bytes_read` counts them. Threads may read at the same time. Use as a context manager, or call `close`.

    Parameters
    ----------
    folder : Path
        For messages and for `config`.
    files : sequence of Path
        The weight files, in order.

    Raises
    ------
    CheckpointError
        A file is unsound, or two files hold the same tensor.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._headers: dict[Path, Header] = {path: read_header(path) for path in files}
        self._where: dict[str, tuple[Path, TensorInfo]] = {}
        for path, header in self._headers.items():
            for info in header.tensors:
                if info.name in self._where:
                    other = self._where[info.name][0].name
                    raise CheckpointError(
                        f"{path}: holds {info.name!r}, which {other} holds too; remove the stale file"
                    )
                self._where[info.name] = (path, info)
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._open = threading.local()  # a file's place is its own in every thread

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open `model.safetensors`, or the shards its index names.

        Raises
        ------
        CheckpointError
            No weights, pickled weights only, a shard is missing, unsound or repeats a tensor,
            or the index names a tensor that its shard does not hold.
        """
        files = weight_files(folder)
        checkpoint = cls(folder, files)
        if files[0].name != SINGLE_NAME:
            checkpoint._check_index(_read_index(folder / INDEX_NAME))
        return checkpoint

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for name, shard in weight_map.items():
            if name not in self._where or self._where[name][0].name != shard:
                raise CheckpointError(
                    f"{self.folder / INDEX_NAME}: {shard} does not hold {name!r} as it says; download the folder again"
                )

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return read_config(self.folder)

    def names(self) -> list[str]:
        """Every tensor's name, file after file, in the order of the data."""
        return list(self._where)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and size of a tensor; CheckpointError if there is none of that name."""
        return self._find(name)[1]

    def _find(self, name: str) -> tuple[Path, TensorInfo]:
        if name not in self._where:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}{suggest(name, self._where)}")
        return self._where[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a whole tensor, converted to `dtype` if given."""
        info = self.info(name)
        return self.read_slice(name, 0, info.elements, dtype).view(info.shape)

    def read_slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read elements start..stop of the flattened tensor.

        Returns
        -------
        Tensor
            Shape (stop - start,), owning its memory, converted to `dtype` if given.
        """
        info = self.info(name)
        stored = torch_dtype(info.dtype)
        data = torch.empty(max(0, stop - start), dtype=stored)
        self.read_into(name, start, stop, data.view(torch.uint8).numpy().data)
        return data if dtype is None else data.to(dtype)

    def read_into(self, name: str, start: int, stop: int, buffer: memoryview) -> None:
        """Read the bytes of elements start..stop as they are stored into a buffer of that size."""
        path, info = self._find(name)
        if not 0 <= start <= stop <= info.elements:
            raise ValueError(f"{name!r}: elements {start}..{stop} of {info.elements}")
        size = torch_dtype(info.dtype).itemsize
        if len(buffer) != (stop - start) * size:
            raise ValueError(f"{name!r}: {len(buffer)} bytes for {stop - start} elements of {size} bytes each")
        self._read_into(path, self.place(name)[1] + start * size, buffer)

    def place(self, name: str) -> tuple[Path, int]:
        """The file of a tensor, and the offset in it where its data begins."""
        path, info = self._find(name)
        return path, self._headers[path].data_start + info.start

    def _read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        file, done = self._file(path), 0
        file.seek(offset)
        while done < len(buffer):  # one call reads at most 2 GiB
            count = file.readinto(buffer[done:])
            if not count:
                raise CheckpointError(f"{path}: became shorter while it was read; is something else writing it?")
            done += count
        with self._lock:
            self.bytes_read += done

    def _file(self, path: Path) -> FileIO:
        files = self._open.__dict__
        if str(path) not in files:
            with self._lock:
                files[str(path)] = self._stack.enter_context(FileIO(path))
        opened: FileIO = files[str(path)]
        return opened

    def close(self) -> None:
        """Close the files."""
        self._stack.close()
        self._open = threading.local()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a model folder, in order.

    A single file wins over an index beside it, as in transformers.

    Raises
    ------
    CheckpointError
        There are none, only pickles, or a shard of the index is missing.
    """
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    index = folder / INDEX_NAME
    if not index.is_file():
        raise CheckpointError(_no_weights(folder))
    shards = sorted(set(_read_index(index).values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: names the shard {shard!r}; a shard is a file in the same folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: names {shard!r}, which is not there; download the folder again")
    return [folder / shard for shard in shards]


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; an index has at most {_MAX_INDEX_BYTES:,}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}; download the folder again") from None
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise CheckpointError(f"{path}: needs weight_map, an object from tensor names to file names")
    return weights


def _no_weights(folder: Path) -> str:
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    pickle = next((n for n in held if n.endswith(_PICKLES)), None)
    if pickle:
        return (
            f"{folder / pickle}: pickled weights can run code when they are opened, so honeloom works on safetensors "
            f"alone; make them with `honeloom convert {folder} OUT`, which runs no code of the file"
        )
    found = ", ".join(held[:8]) or "nothing"
    return f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}; found {found}"
