"""Writing a model folder as a stream: headers from known shapes first, then the data piece by piece.

Files have their final size from the start, so tensors can be written in any order, by several threads, and
those that an interrupted attempt has finished need not be written again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path

import torch

from honeloom.checkpoint.dtypes import format_name
from honeloom.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from honeloom.system import copy_range, preallocate, sync_folder

__all__ = ["SHARD_BYTES", "Progress", "TensorStream", "write_checkpoint", "write_tensors"]

SHARD_BYTES = 5_000_000_000
SYNC_BYTES = 1 << 28
"""Bytes after which finished tensors are brought to the disk and told."""
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class TensorStream:
    """A tensor to write: what it is now, what it holds later.

    Attributes
    ----------
    chunks : callable
        Called once, when the tensor's turn comes; gives its elements in order, in pieces of
        any shape and of this dtype.
    stored : callable
        Asked when the tensor's turn comes: a file and an offset in it where exactly these bytes lie, to be copied
        instead of calling `chunks`; None if they lie nowhere.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]
    stored: Callable[[], tuple[Path, int] | None] = lambda: None

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorStream:
        """A tensor that is in memory already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Progress:
    """What an interrupted attempt has written, and who is told of more.

    Attributes
    ----------
    finished : collection of str
        Tensors whose data is in the files already.
    wrote : callable
        Told the name of every tensor once it is written.
    durable : callable
        Told the names of tensors that the disk holds, a few at a time.
    forgotten : callable
        Told the names of finished tensors whose file is not there any more, before it is made anew.
    """

    finished: Collection[str] = frozenset()
    wrote: Callable[[str], None] = lambda name: None
    durable: Callable[[Sequence[str]], None] = lambda names: None
    forgotten: Callable[[Sequence[str]], None] = lambda names: None


def write_checkpoint(
    folder: Path,
    tensors: Iterable[TensorStream],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = _METADATA,
    threads: int = 1,
    progress: Progress | None = None,
) -> int:
    """Write `model.safetensors`, or shards with their index, as Hugging Face does.

    Equal inputs give equal bytes. Files are flushed to the disk; renaming the folder into place
    is the caller's part. Memory holds one chunk at a time for each thread.

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
    threads : int
        How many tensors are computed and written at a time.
    progress : Progress, optional
        For writing that can be continued.

    Returns
    -------
    int
        Bytes of all weight files.

    Raises
    ------
    ValueError
        Two tensors have one name, or chunks do not fit the dtype and shape announced.
    """
    plan = _distinct(tensors)
    shards = _split(plan, shard_bytes)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = {folder / name: shard for name, shard in zip(names, shards, strict=True)}
    _Writer(files, metadata, progress or Progress()).run(threads)
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
    plan = sorted(_distinct(tensors), key=lambda t: -t.dtype.itemsize)
    _Writer({path: plan}, metadata, Progress()).run(1)
    return path.stat().st_size


def _distinct(tensors: Iterable[TensorStream]) -> list[TensorStream]:
    plan = list(tensors)
    if len({t.name for t in plan}) < len(plan):
        raise ValueError("two tensors to write have the same name")
    return plan


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


@dataclass(slots=True)
class _Writer:
    """Files of their final size, and the tensors that go into them."""

    files: Mapping[Path, Sequence[TensorStream]]
    metadata: Mapping[str, str]
    progress: Progress
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _open: threading.local = field(default_factory=threading.local)
    _stack: ExitStack = field(default_factory=ExitStack)
    _pending: list[str] = field(default_factory=list)
    _unsynced: int = 0

    def run(self, threads: int) -> None:
        """Write everything that is not finished, and bring it to the disk."""
        with self._stack:
            tasks = [task for path, tensors in self.files.items() for task in self._begin(path, tensors)]
            for folder in {path.parent for path in self.files}:
                sync_folder(folder)
            if threads == 1:
                for task in tasks:
                    self._write(*task)
            else:
                _share_out(tasks, self._write, threads, self._stop)
            self._sync()

    def _begin(self, path: Path, tensors: Sequence[TensorStream]) -> Iterator[tuple[Path, int, TensorStream]]:
        """Write the header, unless it stands there with what an attempt has left; yield what is to be done."""
        header = _header(tensors, self.metadata)
        size = len(header) + sum(t.nbytes for t in tensors)
        kept = self.progress.finished and _begins_with(path, header, size)
        if not kept:
            lost = [t.name for t in tensors if t.name in self.progress.finished]
            if lost:
                self.progress.forgotten(lost)
            with open(path, "wb", buffering=0) as file:
                preallocate(file, size)
                file.write(header)
        place = len(header)
        for tensor in tensors:
            if not (kept and tensor.name in self.progress.finished):
                yield path, place, tensor
            place += tensor.nbytes

    def _write(self, path: Path, place: int, tensor: TensorStream) -> None:
        file = self._handle(path)
        if source := tensor.stored():
            copy_range(*source, file, place, tensor.nbytes)
        else:
            file.seek(place)
            self._write_chunks(file, tensor)
        if self._stop.is_set():
            return
        self.progress.wrote(tensor.name)
        with self._lock:
            self._pending.append(tensor.name)
            self._unsynced += tensor.nbytes
            if self._unsynced >= SYNC_BYTES:
                self._sync()

    def _write_chunks(self, file: FileIO, tensor: TensorStream) -> None:
        left = prod(tensor.shape)
        for chunk in tensor.chunks():
            if self._stop.is_set():
                return
            left -= chunk.numel()
            if chunk.dtype != tensor.dtype or left < 0:
                raise ValueError(
                    f"{tensor.name!r}: a chunk of {chunk.numel()} {chunk.dtype} does not fit what was announced"
                )
            _write_all(file, chunk.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if left:
            raise ValueError(f"{tensor.name!r}: {left} elements fewer than its shape {tensor.shape} announces")

    def _handle(self, path: Path) -> FileIO:
        """The file, with a place of its own in every thread."""
        files = self._open.__dict__
        if str(path) not in files:
            file = FileIO(path, "r+b")
            with self._lock:
                files[str(path)] = self._stack.enter_context(file)
        opened: FileIO = files[str(path)]
        return opened

    def _sync(self) -> None:
        for path in self.files:
            with open(path, "r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
        if self._pending:
            self.progress.durable(self._pending)
        self._pending, self._unsynced = [], 0


def _begins_with(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _write_all(file: FileIO, data: memoryview) -> None:
    done = 0
    while done < len(data):  # one call writes at most 2 GiB
        done += file.write(data[done:])


def _share_out(
    tasks: Iterable[tuple[Path, int, TensorStream]],
    work: Callable[[Path, int, TensorStream], None],
    threads: int,
    stop: threading.Event,
) -> None:
    """Do tasks in several threads, begun in their order; the error of the earliest ends all of them."""
    waiting, lock = iter(enumerate(tasks)), threading.Lock()
    failures: list[tuple[int, BaseException]] = []

    def loop() -> None:
        while not stop.is_set():
            with lock:
                number, task = next(waiting, (-1, None))
            if task is None:
                return
            try:
                work(*task)
            except BaseException as error:
                failures.append((number, error))
                stop.set()

    crew = [threading.Thread(target=loop, name=f"honeloom-{i}", daemon=True) for i in range(threads)]
    for thread in crew:
        thread.start()
    try:
        for thread in crew:
            thread.join()
    finally:  # Ctrl-C ends the joining, and must end the work before files are closed
        stop.set()
        for thread in crew:
            thread.join()
    if failures:
        raise min(failures, key=lambda f: f[0])[1]


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
