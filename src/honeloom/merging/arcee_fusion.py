"""Take over the entries of a model whose change matters most."""

from __future__ import annotations

import numpy as np
import torch

from honeloom.merging.engine.select import order_statistics
from honeloom.merging.engine.sums import Array, row_blocks
from honeloom.merging.engine.tensors import Merged, Rule, Tensors
from honeloom.merging.linear import require_models

__all__ = ["arcee_fusion"]

_FLOOR = 1e-8
"""Added to probabilities; the source's constant."""


def _plan_arcee_fusion(tensors: Tensors) -> Merged:
    """Move the base to the model where the importance of the change is at least median + 1.5 interquartile ranges.

    The importance of an entry is the absolute change times the divergence KL(softmax of the model's row, softmax of
    the base's row), with 1e-8 added to the probabilities. Quartiles are those of the whole tensor: the entries of rank
    floor(q (n - 1)).

    Parameters
    ----------
    tensors : Tensors
        One model and the base. The weight does not count.

    Returns
    -------
    callable
        Elements start..stop of the result, float64.

    Raises
    ------
    ConfigError
        Not one model, or no base.

    References
    ----------
    Arcee AI 2024, Arcee Fusion, https://arcee.ai.
    """
    require_models(tensors, "arcee_fusion", 1, 1)
    if not tensors.count:
        return tensors.origin
    divergence = torch.from_numpy(_divergence(tensors))

    def importance(start: int, stop: int) -> torch.Tensor:
        rows = torch.arange(start, stop) // max(1, tensors.columns)
        return tensors.deltas(start, stop)[0].abs_().mul_(divergence[rows])

    last = tensors.count - 1
    low, median, high = order_statistics(importance, tensors.count, [last // 4, last // 2, 3 * last // 4])
    threshold = median + 1.5 * (high - low)

    def merged(start: int, stop: int) -> torch.Tensor:
        taken = importance(start, stop) >= threshold
        return torch.where(taken, tensors.deltas(start, stop)[0], 0.0).add_(tensors.origin(start, stop))

    return merged


arcee_fusion = Rule(_plan_arcee_fusion, needs_base=True)
"""Take the entries of one model whose change matters most for its rows."""


def _divergence(tensors: Tensors) -> Array:
    """KL divergence of each row, (rows,)."""
    columns = tensors.columns
    result = np.zeros(tensors.count // max(1, columns))
    for start, stop in row_blocks(tensors.count, columns):
        p = _softmax(tensors.models[0](start, stop), columns)
        q = _softmax(tensors.origin(start, stop), columns)
        result[start // columns : stop // columns] = (p * np.log(p / q)).sum(axis=1)
    return np.maximum(result, 0.0)


def _softmax(values: torch.Tensor, columns: int) -> Array:
    """Of rows, with the floor added."""
    rows = values.numpy().reshape(-1, columns)
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True) + _FLOOR)
