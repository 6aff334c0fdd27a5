"""Learning rates of single clients, from what set them apart in the rounds before (FedMeZO)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from honeloom.federated.federate_parts import Statistic
from honeloom.ops.noise import keyed_uniform

__all__ = ["RateMemory", "client_rates", "deviations", "drawn_deviations"]

ROUNDS = 5
"""Whose losses five_rounds takes the mean of."""
DECAY = 0.5
"""What is left of a client's deviation after a round that it was not in."""

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


def drawn_deviations(clients: Iterable[str], seed: int, number: int) -> dict[str, float]:
    """Deviations that tell nothing, uniform in [-1, 1]: the control of the others."""
    names = list(clients)
    draws = keyed_uniform(seed, f"federated/rates/{number}", names)
    return {name: 2.0 * float(draw) - 1.0 for name, draw in zip(names, draws, strict=True)}


@dataclass(slots=True)
class RateMemory:
    """What earlier rounds told of every client: its last losses, and how far it was from the others.

    Attributes
    ----------
    losses : dict
        Mean training loss of each client's last five rounds, oldest first.
    deviation : dict
        In [-1, 1]; clients that were never in a round have none, and the base rate.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    deviation: dict[str, float] = field(default_factory=dict)

    def note(
        self, statistic: Statistic, losses: Mapping[str, float], differences: Mapping[str, float], *, robust: bool
    ) -> None:  # fmt: skip
        """Take in a round: what each client that was in it lost in training, and how far it went from the mean.

        A client that was not in it keeps half of what it had. For five_rounds, clients with fewer
        rounds than that have no deviation yet.
        """
        for name, loss in losses.items():
            self.losses[name] = [*self.losses.get(name, []), loss][-ROUNDS:]
        values: Mapping[str, float] = losses if statistic == "loss" else differences
        if statistic == "five_rounds":
            values = {n: statistics.fmean(self.losses[n]) for n in losses if len(self.losses[n]) == ROUNDS}
        found = deviations(values, robust=robust)
        for name in {*self.deviation, *found}:
            self.deviation[name] = found[name] if name in found else DECAY * self.deviation[name]
