"""GGUF files through the package `gguf`: written tensor by tensor, and opened to read keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.export_content import read_tensor
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.gguf.quant import type_bytes
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError, MissingExtraError, NotFiniteError
from honeloom.runs.atomic import require_space

try:
    import gguf
except ImportError as error:
    raise MissingExtraError(f"the package gguf is not installed ({error.name}): pip install 'honeloom[gguf]'") from None

__all__ = ["GgufFile", "write_gguf"]

_CHUNK = 1 << 24
"""Weights that are quantised at a time."""


def write_gguf(path: Path, checkpoint: Checkpoint, keys: Mapping[str, Any], tensors: Sequence[ExportTensor]) -> int:
    """Write a GGUF file; equal inputs give equal bytes, and memory holds one tensor.

    Parameters
    ----------
    path : Path
        The file.
    checkpoint : Checkpoint
        Where the tensors come from.
    keys : mapping
        Metadata, by key.
    tensors : sequence of ExportTensor
        In their order in the file.

    Returns
    -------
    int
        Bytes of the file.

    Raises
    ------
    MissingExtraError
        On import, where the package `gguf` is not installed.
    NotFiniteError
        A weight is NaN or infinite, or beyond what its number type holds.
    """
    require_space(path.parent, sum(type_bytes(t) for t in tensors))
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    try:
        for key, value in keys.items():
            if key != "general.architecture":  # the writer's own
                _add(writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), type_bytes(tensor), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_content(checkpoint, tensor))
    finally:
        writer.close()
    return path.stat().st_size


def _content(checkpoint: Checkpoint, tensor: ExportTensor) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor."""
    quantised = tensor.dtype == "Q8_0"
    stored = read_tensor(checkpoint, tensor, torch.float32 if quantised else None)
    codes = _quantise(stored) if quantised else stored.contiguous().flatten().view(torch.uint8).numpy()
    scales = torch.from_numpy(codes.reshape(-1, 34)[:, :2].copy()).view(torch.float16) if quantised else stored
    if not bool(torch.isfinite(scales).all()):
        source = tensor.source or (tensor.stacked or (tensor.name,))[0]
        raise NotFiniteError(
            f"{checkpoint.folder}: {source!r} holds NaN, infinity, or a number that {tensor.dtype} cannot hold"
            + ("" if quantised else "; if its weights are finite, --quant q8_0 takes larger ones")
        )
    return codes


def _quantise(weights: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Codes of Q8_0: per block of 32 weights a float16 scale, largest / 127, and 32 int8."""
    rows = weights.reshape(-1, weights.shape[-1]).numpy()
    step = max(1, _CHUNK // rows.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # told by who checks the scales
        pieces = [gguf.quantize(rows[i : i + step], gguf.GGMLQuantizationType.Q8_0) for i in range(0, len(rows), step)]
    return np.concatenate(pieces).reshape(-1)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


class GgufFile:
    """A GGUF file, opened lazily: keys, and tensors in float32 as their codes stand for them.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    CheckpointError
        It is no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not a GGUF file: {error}") from None
        self._tensors = {t.name: t for t in self._reader.tensors}

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors

    def get(self, key: str) -> Any:
        """The value of a key, None if there is none."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def need(self, key: str) -> Any:
        """The value of a key; CheckpointError if there is none."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: the file has no key {key!r}")
        return value

    def tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor in float32, or its part `index` along the first axis."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: the file has no tensor {name!r}")
        found = self._tensors[name]
        shape = tuple(int(n) for n in reversed(found.shape))
        data, shape = (found.data, shape) if index is None else (found.data[index], shape[1:])
        values = gguf.dequantize(np.array(data), found.tensor_type)
        return torch.from_numpy(values.astype(np.float32, copy=False)).reshape(shape)
