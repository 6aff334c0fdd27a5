"""Vectors in the plane, for a map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from honeloom.ops.noise import keyed_uniform
from honeloom.selection.vectors import blocks_of
from honeloom.types.ports import Vectors

__all__ = ["plane"]

SAMPLE = 20_000


def plane(vectors: Vectors, *, ids: Sequence[str], seed: int) -> Vectors:
    """Project vectors (N, d) on the two directions of largest variance of a sample, (N, 2).

    The sign of a direction is chosen so that its largest component is positive.
    """
    count = min(len(vectors), SAMPLE)
    draws = keyed_uniform(seed, "plane/sample", ids)
    chosen = np.lexsort((np.arange(len(draws)), draws))[:count]
    sample = np.asarray(vectors[np.sort(chosen)], dtype=np.float64)
    mean = sample.mean(axis=0)
    axes = np.zeros((sample.shape[1], 2))
    _, directions = np.linalg.eigh((sample - mean).T @ (sample - mean))
    found = directions[:, ::-1][:, :2]
    axes[:, : found.shape[1]] = found * np.sign(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])])
    placed = np.empty((len(vectors), 2), dtype=np.float32)
    for part in blocks_of(len(vectors)):
        placed[part] = (np.asarray(vectors[part], dtype=np.float64) - mean) @ axes
    return placed
