"""A model to merge: a full folder, or an adapter whose weights are added to its base while reading."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from honeloom.checkpoint.adapter import LoraAdapter
from honeloom.checkpoint.architectures import architecture_of
from honeloom.checkpoint.dtypes import FLOAT_DTYPES
from honeloom.checkpoint.folders import refuse_quantised, tokenizer_files
from honeloom.checkpoint.headers import TensorInfo
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
            refuse_quantised(self.folder, "merge")
            self._weights = stack.enter_context(Checkpoint.open(self.folder))
            architecture = architecture_of(self._weights.config, self._weights.names())
            self._adapter = None
            if is_adapter:
                self._adapter = stack.enter_context(LoraAdapter(folder, self._weights, architecture))
            self.tensors = {name: self._weights.info(name) for name in self._weights.names()}
            self._check_adapter()
            self._drop_tied_head(architecture.disk_head, architecture.embeddings)
            self._stack = stack.pop_all()

    def _check_adapter(self) -> None:
        for name, factors in self._adapter.factors.items() if self._adapter else ():
            info = self.tensors[name]
            if info.shape != factors.shape or info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{self.name}: the adapter adds {factors.shape} to {name!r}, which is {info.dtype} {info.shape} "
                    f"in {self.folder}; is this the base it was trained on?"
                )

    def _drop_tied_head(self, head: str, embeddings: str) -> None:
        """Some tools store a tied head a second time; a copy is no tensor of its own."""
        name, leaf = f"{head}.weight", f"{embeddings.rpartition('.')[2]}.weight"
        tied = self._weights.config.get("tie_word_embeddings")
        source = next((n for n in self.tensors if n.endswith(leaf)), None)
        if (
            not tied
            or name not in self.tensors
            or source is None
            or (self._adapter and source in self._adapter.factors)
        ):
            return
        one, two = self.tensors[name], self.tensors[source]
        if (one.dtype, one.shape) == (two.dtype, two.shape) and self._equal(name, source, one.elements):
            del self.tensors[name]

    def _equal(self, name: str, other: str, count: int) -> bool:
        for start in range(0, count, _COMPARED):
            stop = min(start + _COMPARED, count)
            if not torch.equal(self.stored(name, start, stop), self.stored(other, start, stop)):
                return False
        return True

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return self._weights.bytes_read + (self._adapter.weights.bytes_read if self._adapter else 0)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return self.tensors[name]

    def stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a flattened tensor as they are stored, without any adapter."""
        return self._weights.read_slice(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a flattened tensor in float64, the adapter's part included.

        Raises
        ------
        NotFiniteError
            An element is NaN or infinite and that is not allowed.
        """
        values = self._weights.read_slice(name, start, stop, torch.float64)
        if self._adapter:
            values = self._adapter.add_to(name, start, values)
        if not self._allow_nan and not bool(torch.isfinite(values).all()):
            first = start + int((~torch.isfinite(values)).nonzero()[0])
            raise NotFiniteError(
                f"{self.name}: tensor {name!r} holds NaN or infinity (element {first}); "
                "the model is damaged. Set allow_nan: true to merge it all the same"
            )
        return values

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> ModelSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
