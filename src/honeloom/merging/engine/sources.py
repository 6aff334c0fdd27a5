"""A model to merge: a full folder, or an adapter whose weights are added to its base while reading."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.adapter import LoraAdapter
from honeloom.checkpoint.architectures import architecture_of
from honeloom.checkpoint.dtypes import FLOAT8_DTYPES, FLOAT_DTYPES
from honeloom.checkpoint.float8 import block_scales
from honeloom.checkpoint.folders import refuse_quantised, tokenizer_files
from honeloom.checkpoint.headers import DTYPE_BITS, TensorInfo
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError, NotFiniteError, SourceError

__all__ = ["ModelSource"]

_COMPARED = 1 << 20


class ModelSource:
    """Lazy access to the weights that a model stands for.

    Parameters
    ----------
    name : str
        As the user wrote it, for messages.
    folder : Path
        Model folder, or PEFT adapter folder.
    base : Path, optional
        For an adapter: the folder of its base model.
    allow_nan : bool
        Accept NaN and infinity among the weights.

    Raises
    ------
    CheckpointError, SourceError
        The files are unsound or unsupported, or an adapter's base is not known.
    """

    def __init__(self, name: str, folder: Path, base: Path | None = None, *, allow_nan: bool = False) -> None:
        is_adapter = (folder / "adapter_config.json").is_file()
        if is_adapter and base is None:
            raise SourceError(f"{name}: an adapter, and its base model is not known; set base_model_name_or_path in it")
        self.name = name
        self.folder = base if is_adapter and base else folder
        self.tokenizer_folder = folder if tokenizer_files(folder) else self.folder
        self._allow_nan = allow_nan
        with ExitStack() as stack:
            self._weights = stack.enter_context(Checkpoint.open(self.folder))
            self._scales = block_scales(self._weights)
            if not self._scales:
                refuse_quantised(self.folder, "merge")
            architecture = architecture_of(self._weights.config, self._weights.names())
            self._adapter = None
            if is_adapter:
                self._adapter = stack.enter_context(LoraAdapter(folder, self._weights, architecture))
            scales = {scale.name for scale in self._scales.values()}
            self.tensors = {name: self._weights.info(name) for name in self._weights.names() if name not in scales}
            self._check_adapter()
            self._head, self._alias = f"{architecture.disk_head}.weight", dict[str, str]()
            leaf = f"{architecture.embeddings.rpartition('.')[2]}.weight"
            self._embeddings = next((n for n in self.tensors if n.endswith(leaf)), "")
            self.architecture = architecture
            self._drop_tied_head()
            self._stack = stack.pop_all()

    def _check_adapter(self) -> None:
        for name, factors in self._adapter.factors.items() if self._adapter else ():
            info = self.tensors[name]
            if info.shape != factors.shape or info.dtype not in FLOAT_DTYPES | FLOAT8_DTYPES:
                raise CheckpointError(
                    f"{self.name}: the adapter adds {factors.shape} to {name!r}, which is {info.dtype} {info.shape} "
                    f"in {self.folder}; is this the base it was trained on?"
                )

    def _drop_tied_head(self) -> None:
        """Some tools store a tied head a second time; a copy is no tensor of its own."""
        tied = self._weights.config.get("tie_word_embeddings")
        name, source = self._head, self._embeddings
        if not tied or name not in self.tensors or not source or (self._adapter and source in self._adapter.factors):
            return
        one, two = self.tensors[name], self.tensors[source]
        if (one.dtype, one.shape) != (two.dtype, two.shape) or not self._equal(name, source, one.elements):
            raise CheckpointError(
                f"{self.name}: tie_word_embeddings is true, but {name!r} is not {source!r}; which of the two is meant? "
                "Remove the tensor, or set tie_word_embeddings to false"
            )
        del self.tensors[name]

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings, and no tensor of its own."""
        return self._head not in self.tensors and self._embeddings in self.tensors

    def untie(self) -> None:
        """Give a tied head a name of its own, for models whose head and embeddings are two tensors."""
        if self.tied:
            self._alias = {self._head: self._embeddings}
            self.tensors[self._head] = self.tensors[self._embeddings]

    @property
    def by_token(self) -> frozenset[str]:
        """Tensors with one row per token."""
        return frozenset({self._embeddings, self._head} & set(self.tensors))

    def _equal(self, name: str, other: str, count: int) -> bool:
        for start in range(0, count, _COMPARED):
            stop = min(start + _COMPARED, count)
            if not torch.equal(self.stored(name, start, stop), self.stored(other, start, stop)):
                return False
        return True

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return self._weights.config

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return self.tensors[name]

    def is_stored(self, name: str) -> bool:
        """Whether a tensor's values are simply what the file holds: no adapter adds to it, no scales multiply it."""
        name = self._alias.get(name, name)
        return not (self._adapter and name in self._adapter.factors) and name not in self._scales

    def place(self, name: str) -> tuple[Path, int]:
        """File and offset of a tensor's bytes."""
        return self._weights.place(self._alias.get(name, name))

    def read_raw(self, name: str, start: int, stop: int, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Elements start..stop of a flattened tensor as stored, in the first bytes of a buffer."""
        data = buffer[: (stop - start) * DTYPE_BITS[self.tensors[name].dtype] // 8]
        self._weights.read_into(self._alias.get(name, name), start, stop, data.data)
        return data

    def stored_bytes(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Elements start..stop of a flattened tensor as bytes."""
        size = DTYPE_BITS[self.tensors[name].dtype] // 8
        data = np.empty((stop - start) * size, dtype=np.uint8)
        self._weights.read_into(self._alias.get(name, name), start, stop, data.data)
        return data

    def stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a flattened tensor as they are stored, without any adapter."""
        return self._weights.read_slice(self._alias.get(name, name), start, stop)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a flattened tensor in float64, the adapter's part included.

        Raises
        ------
        NotFiniteError
            An element is NaN or infinite and that is not allowed.
        """
        stored = self._alias.get(name, name)
        values = self._weights.read_slice(stored, start, stop, torch.float64)
        if stored in self._scales:
            self._scales[stored].multiply(values, start)
        if self._adapter:
            values = self._adapter.add_to(stored, start, values)
        if not self._allow_nan and not bool(torch.isfinite(values).all()):
            raise self.not_finite(name, start + int((~torch.isfinite(values)).nonzero()[0]))
        return values

    def not_finite(self, name: str, element: int) -> NotFiniteError:
        """The error that says where the first NaN or infinity lies."""
        return NotFiniteError(
            f"{self.name}: tensor {name!r} holds NaN or infinity (element {element}); "
            "the model is damaged. Set allow_nan: true to merge it all the same"
        )

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> ModelSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
