"""A band of the response's perplexity."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from honeloom.selection.losses import response_losses
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["perplexity"]


def perplexity(data: SelectionData, *, band: Literal["low", "middle", "high"] = "middle") -> Scores:
    """Score by where the response's perplexity given the prompt lies among all rows.

    low and high rank by perplexity itself; middle prefers rows near the median, by rank.
    Rows that the model cannot score, or that are cut at its limit, come last (score -inf).

    References
    ----------
    Marion et al. 2023, arXiv:2309.04564: the middle band of perplexity prunes best.
    """
    given = response_losses(data, with_prompt=True)
    losses = given.mean
    known = ~np.isnan(losses) & ~given.truncated
    values = np.full(len(losses), -math.inf)
    if band == "middle":
        ranks = np.argsort(np.argsort(losses[known], kind="stable"), kind="stable")
        values[known] = -np.abs((ranks + 0.5) / max(1, known.sum()) - 0.5)
    else:
        values[known] = losses[known] if band == "high" else -losses[known]
    columns = {"perplexity": np.exp(losses).tolist(), "truncated": given.truncated.tolist()}
    return Scores(tuple(values.tolist()), higher_is_better=True, method="perplexity", columns=columns)
