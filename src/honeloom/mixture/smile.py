"""Leading directions of task vectors: an expert counts where its weights have changed most."""

from __future__ import annotations

import torch

from honeloom.errors import ConfigError
from honeloom.mixture.evidence import Evidence, Gate
from honeloom.ops.lowrank import randomised_svd

__all__ = ["smile"]


def smile(evidence: Evidence, *, rank: int, scale: float) -> Gate:
    """Give every expert the right singular vectors of its task vector; a score is the length of the input in them.

    Parameters
    ----------
    evidence : Evidence
        `changes` (m, H) of every expert.
    rank : int
        Singular vectors of each expert.
    scale : float
        Multiplier.

    Returns
    -------
    Gate
        `basis` (E, r, H), float32, r = min(rank, H); rows are orthonormal before the scale. An expert that did not
        change has a basis of zeros, and is chosen last.

    Raises
    ------
    ConfigError
        No expert differs from the base.

    References
    ----------
    Tang et al. 2024, arXiv:2408.10174, section 3.2; without training, and with one gate for the whole unit.
    """
    kept = min(rank, evidence.width)
    basis = torch.zeros(evidence.experts, kept, evidence.width)
    changed = 0
    for index, change in enumerate(evidence.changes):
        _, values, right = randomised_svd(change, kept, seed=evidence.seed)
        real = int((values > 0).sum())
        basis[index, :real] = right[:real].float() * scale
        changed += real > 0
    if not changed:
        raise ConfigError(f"{evidence.name}: no expert differs from base_model there, so there is nothing to route by")
    return Gate({"basis": basis})
