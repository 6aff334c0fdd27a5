"""Writing an export as a model folder, tensor by tensor, without a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from honeloom.checkpoint.dtypes import torch_dtype
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.folders import copy_config, copy_tokenizer, read_config
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import SHARD_BYTES, TensorStream, write_checkpoint
from honeloom.dropping.export.plan import ExportPlan
from honeloom.runs.atomic import require_space

__all__ = ["export_bytes", "write_export"]

CHUNK = 1 << 22


def export_bytes(plan: ExportPlan) -> int:
    """Bytes of the tensors of an export."""
    return sum(prod(t.shape) * torch_dtype(t.dtype).itemsize for t in plan.tensors)


def write_export(folder: Path, checkpoint: Checkpoint, plan: ExportPlan, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write weights, config.json, generation_config.json, tokenizer and further files into an existing folder.

    Equal inputs give equal bytes; memory holds one chunk of a tensor.

    Returns
    -------
    int
        Bytes of the weight files.

    Raises
    ------
    ValueError
        The plan is of a GGUF file, which is written by `honeloom.backends.gguf`.
    """
    if plan.keys:
        raise ValueError("a GGUF export is one file, not a model folder; write it with honeloom.backends.gguf")
    require_space(folder, export_bytes(plan))
    size = write_checkpoint(folder, [_stream(checkpoint, t) for t in plan.tensors], shard_bytes=shard_bytes)
    copy_config(checkpoint.folder, folder, drop=tuple(read_config(checkpoint.folder)), changes=plan.config)
    copy_tokenizer(checkpoint.folder, folder)
    for name, text in plan.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return size


def _stream(checkpoint: Checkpoint, tensor: ExportTensor) -> TensorStream:
    dtype, size, source = torch_dtype(tensor.dtype), prod(tensor.shape), tensor.source
    if source is not None and not tensor.heads:
        return TensorStream(
            tensor.name, dtype, tensor.shape, lambda: [checkpoint.read(source)], lambda: checkpoint.place(source)
        )

    def chunks() -> Iterator[torch.Tensor]:
        for start in range(0, size, CHUNK):
            yield torch.zeros(min(CHUNK, size - start), dtype=dtype)

    return TensorStream(tensor.name, dtype, tensor.shape, chunks)
