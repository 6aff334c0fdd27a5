"""What an export writes: tensors under their new names, the configuration, and what is gained by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.dropping.normalise import Block

__all__ = ["ExportPlan", "Saving"]

Saving = Literal["params", "kv", "flops"]


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """All that an export writes, as data.

    Attributes
    ----------
    profile : str
        "zero", "native", "dropped", "decilm" or "gguf".
    tensors : tuple of ExportTensor
        In the order of the source.
    config : mapping
        The whole content of config.json; empty for gguf.
    files : mapping
        Further files of text, by name.
    keys : mapping
        Metadata of a GGUF file, by key.
    blocks : tuple of Block
        From which layers each block of the result has its halves.
    saves : tuple of str
        What the result spares when it runs: "params", "kv", "flops".
    loads_in : tuple of str
        Runtimes that load the result.
    notes : tuple of str
        What a reader should know: limits, and what was put in place of what.
    """

    profile: str
    tensors: tuple[ExportTensor, ...]
    config: Mapping[str, Any]
    blocks: tuple[Block, ...]
    saves: tuple[Saving, ...]
    loads_in: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """Elements of all tensors written."""
        return sum(prod(t.shape) for t in self.tensors)
