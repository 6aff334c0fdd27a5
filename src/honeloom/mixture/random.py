"""Random directions: what a router must beat."""

from __future__ import annotations

from honeloom.mixture.evidence import Evidence, Gate
from honeloom.ops.noise import normal

__all__ = ["random"]


def random(evidence: Evidence, *, scale: float) -> Gate:
    """Draw a direction of length 1 for every expert, times a scale.

    Parameters
    ----------
    evidence : Evidence
        Its name, sizes and seed count.
    scale : float
        Multiplier.

    Returns
    -------
    Gate
        `weight` (E, H), float32.
    """
    count = evidence.experts * evidence.width
    rows = normal(evidence.seed, f"gate/{evidence.name}", count).view(evidence.experts, evidence.width)
    return Gate({"weight": rows / rows.norm(dim=1, keepdim=True) * scale})
