"""The content of a tensor that an export writes."""

from __future__ import annotations

import torch

from honeloom.checkpoint.dtypes import torch_dtype
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.reader import Checkpoint

__all__ = ["interleave", "read_tensor"]


def read_tensor(checkpoint: Checkpoint, tensor: ExportTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The whole content of a tensor to write, of its own shape.

    Parameters
    ----------
    checkpoint : Checkpoint
        The source.
    tensor : ExportTensor
        What is written.
    dtype : torch.dtype, optional
        Of the result; by default the tensor's own, which must then be one of torch's.
    """
    dtype = dtype or torch_dtype(tensor.dtype)
    if tensor.values is not None:
        return torch.tensor(tensor.values, dtype=dtype)
    if tensor.stacked:
        return torch.stack([checkpoint.read(name, dtype) for name in tensor.stacked]).view(tensor.shape)
    if tensor.source is None:
        return torch.zeros(tensor.shape, dtype=dtype)
    found = checkpoint.read(tensor.source, dtype).view(tensor.shape)
    return interleave(found, tensor.heads) if tensor.heads else found


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head a0 a1 .. b0 b1 .. as a0 b0 a1 b1 ..: rotary pairs side by side; (N, ...) -> (N, ...)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
