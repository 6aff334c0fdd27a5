"""Dot products of all pairs of models, streamed, with the same bits whatever the pieces."""

from __future__ import annotations

import numpy as np
import torch

from honeloom.merging.engine.operands import kernels, operands
from honeloom.merging.engine.tensors import BLOCK, Tensors

__all__ = ["LANES", "gram", "gram_block"]

LANES = 1024
"""Partial sums per block: element i is added to the sum i % LANES, so that sums are plain loops over vectors."""
_BLOCKS = 16


def gram_block(values: torch.Tensor) -> torch.Tensor:
    """Dot products of all pairs of rows of a block: the plain computation that the compiled one equals to the bit.

    Parameters
    ----------
    values : Tensor
        (K, n), float64, n at most BLOCK.

    Returns
    -------
    Tensor
        (K, K), float64. Each is 1024 sums of every 1024th product, in order, which are then added by halves.
    """
    models, count = values.shape
    rows = torch.nn.functional.pad(values, (0, -count % LANES)).view(models, -1, LANES)
    result = torch.zeros(models, models, dtype=torch.float64)
    for i in range(models):
        for j in range(i, models):
            sums = torch.zeros(LANES, dtype=torch.float64)
            for row in range(rows.shape[1]):
                sums += rows[i, row] * rows[j, row]
            while len(sums) > 1:
                sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
            result[i, j] = result[j, i] = sums[0]
    return result


def gram(tensors: Tensors, *, deltas: bool) -> torch.Tensor:
    """Dot products of all pairs of models, flattened, or of all pairs of task vectors.

    Parameters
    ----------
    tensors : Tensors
        K models.
    deltas : bool
        Of models minus base.

    Returns
    -------
    Tensor
        (K, K), float64: the sum of the blocks' products, in their order.

    Raises
    ------
    ConfigError
        `deltas` without a base.
    """
    base = tensors.origin if deltas else None
    models = len(tensors.models)
    total = np.zeros((models, models))
    for start in range(0, tensors.count, _BLOCKS * BLOCK):
        stop = min(start + _BLOCKS * BLOCK, tensors.count)
        for _, part in operands(tensors, start, stop, base):
            products = np.zeros((-(-part.count // BLOCK), models, models))
            kernels("kernels").gram(*part.arguments, products)
            for block in products:
                total += block
    upper = torch.from_numpy(np.triu(total))
    return upper + torch.triu(upper, 1).T
