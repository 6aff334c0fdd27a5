"""Losses of all rows, in their order, from the model port."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from honeloom.types.ports import SelectionData

__all__ = ["Losses", "response_losses"]

Losses = NDArray[np.float64]


def response_losses(data: SelectionData, *, with_prompt: bool) -> Losses:
    """Mean loss of every row's response in nats per token, shape (N,); NaN where it cannot be scored."""
    place = {row_id: i for i, row_id in enumerate(data.rows.ids)}
    losses = np.full(len(place), np.nan)
    for row, loss in data.open_model().losses(data.rows, with_prompt=with_prompt):
        if loss.tokens:
            losses[place[row.id]] = loss.loss_sum / loss.tokens
    return losses
