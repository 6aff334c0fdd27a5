"""Weights stored in 8-bit floating point with one scale per block of the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError

__all__ = ["BlockScales", "block_scales"]

_SUFFIX = "_scale_inv"


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The scales of one matrix: element (i, j) counts scale[i // height, j // width] times.

    Attributes
    ----------
    name : str
        Of the tensor that holds them.
    values : Tensor
        float64, one per block, row after row.
    columns, height, width : int
        Length of the matrix's rows; rows and columns of a block.
    """

    name: str
    values: torch.Tensor
    columns: int
    height: int
    width: int

    def multiply(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Apply the scales to elements start... of the flattened matrix, in place."""
        index = torch.arange(start, start + len(values))
        rows, columns = index // self.columns // self.height, index % self.columns // self.width
        return values.mul_(self.values[rows, columns])


def block_scales(checkpoint: Checkpoint) -> dict[str, BlockScales]:
    """Scales of every matrix of a checkpoint that says it is quantised to block-wise fp8, as DeepSeek-V3 is.

    Parameters
    ----------
    checkpoint : Checkpoint
        With `quantization_config` {"quant_method": "fp8", "weight_block_size": [rows, columns]} in its config.

    Returns
    -------
    dict
        By the matrix's name; empty for any other checkpoint.

    Raises
    ------
    CheckpointError
        Scales that do not fit their matrix.

    References
    ----------
    DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.
    """
    settings = checkpoint.config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return {}
    names = set(checkpoint.names())
    found = {}
    for name in checkpoint.names():
        if name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in names:
            matrix = name.removesuffix(_SUFFIX)
            found[matrix] = _scales(checkpoint, matrix, name, settings.get("weight_block_size"))
    return found


def _scales(checkpoint: Checkpoint, matrix: str, name: str, block: Any) -> BlockScales:
    shape, scales = checkpoint.info(matrix).shape, checkpoint.info(name).shape
    fits = (
        isinstance(block, list)
        and len(block) == len(shape) == len(scales) == 2
        and all(type(b) is int and b > 0 for b in block)
        and all(-(-n // b) == s for n, b, s in zip(shape, block, scales, strict=True))
    )
    if not fits:
        raise CheckpointError(
            f"{checkpoint.folder}: {name!r} has shape {scales}, "
            f"which does not fit {matrix!r} {shape} in blocks of {block}"
        )
    return BlockScales(name, checkpoint.read(name, torch.float64), shape[1], block[0], block[1])
