"""Weights in pickled files: the one place that opens them, and takes nothing but tensors from them.

A pickle is a program. It is read by torch's unpickler for weights alone, which builds tensors and plain containers and
refuses every other call before it is made; whatever it refuses is refused here.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from honeloom.checkpoint.dtypes import format_name
from honeloom.errors import CheckpointError

__all__ = ["ADAPTER_PICKLE", "PickledTensor", "PickledWeights", "pickled_files"]

ADAPTER_PICKLE = "adapter_model.bin"
_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = {".bin", ".pt", ".pth"}
_OF_TRAINING = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|random_states")
_ZIP = b"PK\x03\x04"
_CALLED = re.compile(r"GLOBAL (\S+)")


def pickled_files(folder: Path) -> list[Path]:
    """Weight files of a folder whose weights exist only as pickles, in order.

    Parameters
    ----------
    folder : Path
        With adapter_model.bin; or pytorch_model.bin, or shards and pytorch_model.bin.index.json; or one other file
        that ends in .bin, .pt or .pth, those of an optimizer or a scheduler aside.

    Raises
    ------
    CheckpointError
        There are safetensors, so that nothing is to be converted; there are no weights, or it is not clear which; a
        shard is missing.
    """
    held = sorted(p.name for p in folder.iterdir() if p.is_file())
    if safe := next((name for name in held if name.endswith(".safetensors")), None):
        raise CheckpointError(f"{folder}: nothing to convert: its weights are safetensors already ({safe})")
    if (folder / ADAPTER_PICKLE).is_file() and (folder / "adapter_config.json").is_file():
        return [folder / ADAPTER_PICKLE]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return _shards(folder / _INDEX)
    others = [name for name in held if Path(name).suffix in _SUFFIXES and not _OF_TRAINING.match(name)]
    if len(others) != 1:
        found = ", ".join(others or held[:8]) or "nothing"
        why = f"several pickled files and no {_INDEX}" if others else "no pickled weights"
        raise CheckpointError(
            f"{folder}: {why} (found {found}); "
            f"convert takes {_SINGLE}, shards with {_INDEX}, {ADAPTER_PICKLE}, or one other .bin, .pt or .pth file"
        )
    return [folder / others[0]]


def _shards(index: Path) -> list[Path]:
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not JSON: {error}; download the folder again") from None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{index}: needs weight_map, an object from tensor names to file names")
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: names {shard!r}, which is not in its folder; download the folder again")
    return [index.parent / shard for shard in shards]


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """One tensor: its name, the file that holds it, type and shape."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class PickledWeights:
    """The tensors in pickled files, of which one is open at a time.

    Files of the zip format (torch 1.6 and later) are mapped, not read, so memory holds what is used; a file of the
    older format is in memory as a whole while it is open.

    Parameters
    ----------
    files : sequence of Path
        The weight files, in order.

    Attributes
    ----------
    tensors : dict
        Name -> PickledTensor, in the order of the files.

    Raises
    ------
    CheckpointError
        A file is damaged, asks for a call, holds something else than dense tensors by name, or repeats a tensor.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors: dict[str, PickledTensor] = {}
        self._open: tuple[Path, Mapping[str, torch.Tensor]] | None = None
        for file in files:
            for name, tensor in self._content(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file}: holds {name!r}, which {self.tensors[name].file.name} holds too; remove the stale file"
                    )
                self.tensors[name] = PickledTensor(name, file, tensor.dtype, tuple(tensor.shape))

    def read(self, name: str) -> torch.Tensor:
        """A tensor, contiguous; its memory is that of the file where it can be, so it must not be changed."""
        return self._content(self.tensors[name].file)[name].contiguous()

    def _content(self, file: Path) -> Mapping[str, torch.Tensor]:
        if self._open is None or self._open[0] != file:
            self._open = None  # gives the other file back before this one is opened
            self._open = (file, _tensors(file, _load(file)))
        return self._open[1]


def _load(path: Path) -> Any:
    """What a pickle holds, read by the unpickler that makes tensors and containers and calls nothing else."""
    with open(path, "rb") as file:
        mapped = file.read(len(_ZIP)) == _ZIP
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a strange file makes the parser stumble anywhere
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and (called := _CALLED.search(text)):
            raise CheckpointError(
                f"{path}: not converted: it asks for {called[1]!r}, and only tensors are taken from a pickle; nothing "
                "of it was run. Ask its publisher for safetensors"
            ) from None
        reason = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(". ")[0]
        reason = "a TorchScript program" if "TorchScript" in text else reason
        raise CheckpointError(
            f"{path}: not converted: it is damaged or holds more than tensors ({(reason or type(error).__name__)!r}); "
            "nothing of it was run. Download it again, or ask its publisher for safetensors"
        ) from None


def _tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """Check that a file holds dense tensors by name."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; weights are tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = f"{name!r} is of type" if isinstance(name, str) else f"the key {name!r} is no name, but of type"
            kind = type(tensor if isinstance(name, str) else name).__name__
            raise CheckpointError(
                f"{path}: {found} {kind}; only tensors by name can be converted: save the model's state_dict alone"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name!r} is no dense tensor with values; safetensors cannot hold it")
        try:
            format_name(tensor.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name!r}: {error}") from None
    return {name: tensor.detach() for name, tensor in content.items()}
