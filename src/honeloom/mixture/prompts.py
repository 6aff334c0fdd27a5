"""Directions of prompts: mean of what the router receives for an expert's prompts, minus its negative ones."""

from __future__ import annotations

import torch

from honeloom.errors import ConfigError
from honeloom.mixture.evidence import Evidence, Gate

__all__ = ["prompts"]


def prompts(evidence: Evidence, *, scale: float) -> Gate:
    """Give every expert the direction in which its prompts lie, seen from the mean of all experts.

    What all prompts have in common is most of a hidden state and tells no expert from another, so the mean over the
    experts is removed before rows get length 1.

    Parameters
    ----------
    evidence : Evidence
        `positive` has a vector at least of every expert; `negative` may be empty.
    scale : float
        Multiplier.

    Returns
    -------
    Gate
        `weight` (E, H), float32.

    Raises
    ------
    ConfigError
        Two experts' prompts look alike to the router, so that no direction is left.

    References
    ----------
    Goddard et al. 2024, arXiv:2403.13257 (mergekit); Tang et al. 2024 (Model-GLUE), arXiv:2410.05357.
    """
    rows = []
    for positive, negative in zip(evidence.positive, evidence.negative, strict=True):
        row = positive.double().mean(dim=0)
        rows.append(row - negative.double().mean(dim=0) if len(negative) else row)
    stacked = torch.stack(rows)
    size = stacked.norm(dim=1).max()
    if evidence.experts > 1:
        stacked = stacked - stacked.mean(dim=0)
    norms = stacked.norm(dim=1, keepdim=True)
    dull = int((norms[:, 0] <= 1e-6 * size).sum())
    if dull:
        raise ConfigError(
            f"{evidence.name}: the prompts of {dull} of {evidence.experts} experts give the router the mean of all "
            "experts and no direction; give every expert prompts of its own"
        )
    return Gate({"weight": (stacked / norms * scale).float()})
