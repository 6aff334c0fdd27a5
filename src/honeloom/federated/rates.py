"""Learning rates of single clients, from what set them apart in the rounds before (FedMeZO)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

__all__ = ["client_rates", "deviations"]

SMALLEST = 1e-12
"""Deviations below this share of the mean's magnitude count as none."""


def deviations(statistic: Mapping[str, float], *, robust: bool = False, scale: float = 3.0) -> dict[str, float]:
    """How far each client's statistic is from the mean, in [-1, 1].

    The published form divides by the largest deviation, so that some client is always at an end, even where all
    there is is noise. The robust form divides by `scale` times the median absolute deviation and
    clips.

    Parameters
    ----------
    statistic : mapping
        By client: its loss in the last round, its mean loss over five rounds, or the distance of its update from the
        mean update.
    robust : bool
        Which form.
    scale : float
        Median absolute deviations that count as 1.

    Returns
    -------
    dict
        0 for everybody where all are equal, or there is only one.

    References
    ----------
    Ling et al. 2024 (FedMeZO), arXiv:2402.05926, section 5.
    """
    if not statistic:
        return {}
    mean = statistics.fmean(statistic.values())
    apart = {name: value - mean for name, value in statistic.items()}
    unit = max(abs(d) for d in apart.values())
    if robust:
        middle = statistics.median(statistic.values())
        apart = {name: value - middle for name, value in statistic.items()}
        unit = scale * statistics.median(abs(d) for d in apart.values()) or unit
    if unit <= SMALLEST * abs(mean) or unit == 0:
        return dict.fromkeys(statistic, 0.0)
    return {name: max(-1.0, min(1.0, d / unit)) for name, d in apart.items()}


def client_rates(
    deviation: Mapping[str, float], base: float, spread: float, *, least: float = 0.0, most: float = float("inf")
) -> dict[str, float]:
    """Rates base + spread * deviation, within bounds.

    Parameters
    ----------
    deviation : mapping
        By client, in [-1, 1].
    base, spread : float
        The published runs have 1e-5 and 5e-6.
    least, most : float
        Bounds of a rate.
    """
    return {name: min(most, max(least, base + spread * d)) for name, d in deviation.items()}
