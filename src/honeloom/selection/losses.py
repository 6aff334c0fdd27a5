"""Losses of all rows, in their order, from the model port."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from honeloom.types.ports import SelectionData

__all__ = ["Losses", "ResponseLosses", "response_losses"]

Losses = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ResponseLosses:
    """Losses of all rows.

    Attributes
    ----------
    mean : array of shape (N,)
        Nats per token of the response; NaN where it cannot be scored.
    truncated : array of shape (N,)
        Whether the row was cut at the model's limit, so that `mean` is over a part of the response.
    """

    mean: Losses
    truncated: NDArray[np.bool_]


def response_losses(data: SelectionData, *, with_prompt: bool) -> ResponseLosses:
    """Ask the model for the loss of every row's response."""
    place = {row_id: i for i, row_id in enumerate(data.rows.ids)}
    losses, truncated = np.full(len(place), np.nan), np.zeros(len(place), dtype=bool)
    for row, loss in data.open_model().losses(data.rows, with_prompt=with_prompt):
        truncated[place[row.id]] = loss.truncated
        if loss.tokens:
            losses[place[row.id]] = loss.loss_sum / loss.tokens
    return ResponseLosses(losses, truncated)
