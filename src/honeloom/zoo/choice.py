"""Whose a row is, and which model is best where. Pure numpy on per-row numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["assign_rows", "best_by_domain", "domain_means", "fill_unread"]

Values = npt.NDArray[np.float64]


def fill_unread(scores: Mapping[str, Values]) -> dict[str, Values]:
    """Give a model that cannot read a row the worst that any other made of it; rows that nobody reads weigh nothing.

    Parameters
    ----------
    scores : mapping
        Model -> (R, 2), summed value and weight of every row; NaN where it was not read.
    """
    stacked = np.stack(list(scores.values()))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = stacked[..., 0] / stacked[..., 1]
    ratios = np.where(np.isfinite(ratios), ratios, -np.inf)
    worst = stacked[ratios.argmax(axis=0), np.arange(stacked.shape[1])]
    worst = np.where(np.isfinite(worst), worst, 0.0)
    return {name: np.where(np.isnan(values), worst, values) for name, values in scores.items()}


def domain_means(values: Values, domains: Sequence[str]) -> dict[str, float]:
    """Ratio of summed value and summed weight of every domain; NaN where nothing weighs.

    Parameters
    ----------
    values : array (R, 2)
        Summed value and weight of each row.
    domains : sequence of str
        R labels.
    """
    labels, found = np.array(domains), {}
    for domain in sorted(dict.fromkeys(domains)):
        total, weight = values[labels == domain].sum(axis=0)
        found[domain] = float(total / weight) if weight else float("nan")
    return found


def best_by_domain(scores: Mapping[str, Values], domains: Sequence[str]) -> dict[str, str]:
    """The model with the lowest mean in every domain; the first named of equals."""
    means = {name: domain_means(values, domains) for name, values in scores.items()}
    found = {}
    for domain in sorted(dict.fromkeys(domains)):
        known = {name: m[domain] for name, m in means.items() if not np.isnan(m[domain])}
        if known:
            found[domain] = min(known, key=lambda name: known[name])
    return found


def assign_rows(scores: Mapping[str, Values]) -> list[str]:
    """The expert with the lowest value per unit of weight for every row; the first named of equals.

    Parameters
    ----------
    scores : mapping
        Expert -> (R, 2), as from `fill_unread`.

    Returns
    -------
    list of str
        One name per row; "" where the row weighs nothing.
    """
    names = list(scores)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.stack([scores[name][:, 0] / scores[name][:, 1] for name in names])
    ratios = np.where(np.isfinite(ratios), ratios, np.inf)
    best = ratios.argmin(axis=0)
    return [names[i] if np.isfinite(ratios[i, row]) else "" for row, i in enumerate(best)]
