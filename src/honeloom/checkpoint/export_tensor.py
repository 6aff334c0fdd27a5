"""A tensor on its way into another file: where its content comes from, and how it is laid there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from honeloom.checkpoint.reader import Checkpoint

__all__ = ["ExportTensor"]


@dataclass(frozen=True, slots=True)
class ExportTensor:
    """A tensor to write.

    Attributes
    ----------
    name : str
        In the new file.
    source : str or None
        In the source's files; None for zeros, and where `values` or `stacked` say the content.
    shape : tuple of int
        As it is written.
    dtype : str
        As safetensors names it ("BF16"), or "Q8_0".
    heads : int
        If above 0, rows are heads whose two rotary halves are interleaved, as llama.cpp wants queries and keys.
    values : tuple of float, optional
        The content itself, of a tensor that no file holds.
    stacked : tuple of str
        Tensors of the source, all of one shape, that become one along a new first axis.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    dtype: str
    heads: int = 0
    values: tuple[float, ...] | None = None
    stacked: tuple[str, ...] = ()

    @classmethod
    def copied(cls, checkpoint: Checkpoint, source: str, name: str | None = None, *, heads: int = 0) -> ExportTensor:
        """A tensor of the source, under a new name or its own."""
        info = checkpoint.info(source)
        return cls(name or source, source, info.shape, info.dtype, heads)
