"""Number types of a GGUF file: which tensor gets which, and how many bytes it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.headers import DTYPE_BITS

__all__ = ["FILE_TYPES", "Q8_BLOCK", "QUANTS", "kept_wider", "retyped", "type_bytes"]

FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
"""Number type of most matrices -> general.file_type."""
QUANTS: Mapping[str, str] = {"f16": "F16", "q8_0": "Q8_0"}
"""What --quant takes -> the type of matrices."""
Q8_BLOCK = 32
"""Weights of a row that share one scale in Q8_0: 32 bytes and a float16."""
_ROUTERS = (".ffn_gate_inp.weight",)


def retyped(tensors: Sequence[ExportTensor], quant: str) -> tuple[ExportTensor, ...]:
    """Tensors of a file in the number types of a quantisation.

    Matrices, embeddings and head included, take the type; vectors (norms, biases) and routers stay float32. Rows
    that blocks of 32 do not divide are float16 in Q8_0.

    Parameters
    ----------
    tensors : sequence of ExportTensor
        Under llama.cpp's names.
    quant : str
        A key of QUANTS.
    """
    return tuple(replace(t, dtype=_type_of(t, quant)) for t in tensors)


def _type_of(tensor: ExportTensor, quant: str) -> str:
    if len(tensor.shape) == 1 or tensor.name.endswith(_ROUTERS):
        return "F32"
    return "F16" if quant == "q8_0" and tensor.shape[-1] % Q8_BLOCK else QUANTS[quant]


def kept_wider(tensors: Sequence[ExportTensor], quant: str) -> tuple[str, ...]:
    """Names of matrices that Q8_0 cannot take because of the length of their rows."""
    return tuple(t.name for t in tensors if quant == "q8_0" and t.dtype == "F16")


def type_bytes(tensor: ExportTensor) -> int:
    """Bytes of a tensor in its type."""
    elements = prod(tensor.shape)
    if tensor.dtype == "Q8_0":
        return elements // Q8_BLOCK * (Q8_BLOCK + 2)
    return elements * DTYPE_BITS[tensor.dtype] // 8
