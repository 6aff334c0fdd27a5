"""Instruction-following difficulty."""

from __future__ import annotations

import math

import numpy as np

from honeloom.selection.losses import Losses, response_losses
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["ifd", "ifd_ratio"]


def ifd_ratio(conditional: Losses, alone: Losses) -> Losses:
    """Perplexity of the response with its prompt over that without: exp(L(y|x) - L(y)), (N,) -> (N,)."""
    ratio: Losses = np.exp(conditional - alone)
    return ratio


def ifd(data: SelectionData) -> Scores:
    """Score by IFD = PPL(y|x) / PPL(y); rows at 1 or above are not helped by their prompt and come last.

    Both perplexities use the same format and the same response tokens; "without" means an
    empty prompt, so a row whose prompt is empty has a ratio of exactly 1. A row that is cut at
    the model's limit keeps fewer response tokens with its prompt than without, so its ratio
    means nothing and its score is -inf.

    References
    ----------
    Li et al. 2024, arXiv:2308.12032 (Cherry LLM) and arXiv:2402.00530 (Superfiltering).
    """
    given = response_losses(data, with_prompt=True)
    conditional, alone = given.mean, response_losses(data, with_prompt=False).mean
    ratio = ifd_ratio(conditional, alone)
    with np.errstate(invalid="ignore"):
        values = np.where(ratio < 1, ratio, -ratio)
    values[np.isnan(ratio) | given.truncated] = -math.inf
    columns = {
        "ifd": ratio.tolist(), "loss": conditional.tolist(), "loss_without_prompt": alone.tolist(),
        "truncated": given.truncated.tolist(),
    }  # fmt: skip
    return Scores(tuple(values.tolist()), higher_is_better=True, method="ifd", columns=columns)
