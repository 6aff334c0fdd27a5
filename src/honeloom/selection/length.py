"""Longest (or shortest) responses."""

from __future__ import annotations

from typing import Literal

from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["length"]


def length(data: SelectionData, *, order: Literal["longest", "shortest"] = "longest") -> Scores:
    """Score by the number of tokens of the response, under the model's tokenizer.

    References
    ----------
    Shen 2024, arXiv:2402.06094; Zhao et al. 2024, arXiv:2402.04833: a strong, cheap baseline.
    """
    model = data.open_model()
    counts = [model.count_tokens(row.response or row.text) for row in data.rows]
    sign = 1.0 if order == "longest" else -1.0
    values = tuple(sign * c for c in counts)
    return Scores(values, higher_is_better=True, method="length", columns={"tokens": counts})
