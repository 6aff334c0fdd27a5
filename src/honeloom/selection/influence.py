"""Influence of rows on a target by gradients at checkpoints of a short warm-up: LESS and TracIn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from honeloom.errors import RowsError
from honeloom.selection.in_run import draw, row_batches
from honeloom.types.plans import Scores
from honeloom.types.ports import GradientPort, RowTable, SelectionData
from honeloom.types.rows import Row

__all__ = ["checkpoint_rates", "cosines", "less", "target_directions", "tracin"]

Values = npt.NDArray[np.float64]
Array = npt.NDArray[np.floating]
WINDOW = 1024
"""Rows whose projections are held together."""


def target_directions(gradients: Array, labels: Sequence[str | None], over: Literal["mean", "max"]) -> Values:
    """What rows are compared with, from the gradients of the target's rows.

    Parameters
    ----------
    gradients : array of shape (m, p)
        One per target row; rows of NaN are left out.
    labels : sequence of str or None
        Domain of every target row; rows without one are a domain together.
    over : {"mean", "max"}
        "mean": the mean of the rows' unit gradients, so that the inner product of a unit vector
        with it is its mean cosine with the target's rows. "max": the unit mean gradient of every
        domain.

    Returns
    -------
    ndarray
        Shape (1, p) or (domains, p).

    Raises
    ------
    RowsError
        No gradient is finite.
    """
    known = np.isfinite(gradients).all(axis=1)
    if not known.any():
        raise RowsError(
            f"none of the {len(gradients)} target rows has a scored token; give rows with answers, or raise "
            "--max-length"
        )
    exact = gradients.astype(np.float64)
    if over == "mean":
        return np.asarray(_unit(exact[known]).mean(axis=0, keepdims=True))
    names = np.array([label or "" for label in labels])
    groups = sorted(set(names[known].tolist()))
    return _unit(np.stack([exact[known & (names == group)].mean(axis=0) for group in groups]))


def cosines(steps: Array, directions: Array) -> Values:
    """Inner products (n, K) of directions (K, p) with the steps (n, p) scaled to length 1; a zero step gives 0."""
    return np.asarray(_unit(steps.astype(np.float64)) @ directions.T)


def _unit(vectors: Values) -> Values:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Values = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths != 0)
    return scaled


def checkpoint_rates(
    port: GradientPort, rows: Sequence[Row], *, checkpoints: int, batch_size: int, lr: float, seed: int
) -> Iterator[float]:
    """Tune over the rows once per checkpoint; stop after each and yield the mean learning rate on the way to it.

    Parameters
    ----------
    port : GradientPort
        Is reset first.
    rows : sequence of Row
        Of the warm-up.
    checkpoints : int
        Passes over the rows, each in an order drawn by seed and row id.
    batch_size : int
        Rows per step.
    lr : float
        Learning rate, falling linearly to zero over all of them.
    """
    port.reset()
    batches = row_batches([row.id for row in rows], checkpoints, batch_size, seed)
    length = len(batches) // checkpoints
    rates = [lr * (1 - step / len(batches)) for step in range(len(batches))]
    for start in range(0, len(batches), length):
        for batch, rate in zip(batches[start : start + length], rates[start : start + length], strict=True):
            port.train([rows[i] for i in batch], lr=rate)
        yield sum(rates[start : start + length]) / length


def less(
    data: SelectionData, *, checkpoints: int, warmup: float, batch_size: int, lr: float, rank: int, size: int,
    target_rows: int, mode: Literal["standard", "less-paper"],
) -> Scores:  # fmt: skip
    """Score by the cosine of the Adam step that a row would cause with the target's gradient, after a warm-up.

    Gradients are those of LoRA adapters, projected to `size` numbers. Standard: at the end of the
    warm-up, the mean cosine with the target's rows. There the learning rate has come down and
    the weights have settled; before, the target's gradient mostly points back along the last
    steps, which says nothing about a row. No row of the target counts more because its gradient
    is large, and no domain decides alone. "less-paper": the cosine with a domain's mean gradient,
    summed over checkpoints that weigh as much as their learning rate; the largest over the
    target's domains.

    References
    ----------
    Xia et al. 2024, arXiv:2402.04333.
    """
    port, warm, target = _prepare(data, rank, warmup, target_rows)
    labels, paper = [row.domain for row in target], mode == "less-paper"
    total: Values = np.zeros((len(data.rows), 1))
    rates = checkpoint_rates(port, warm, checkpoints=checkpoints, batch_size=batch_size, lr=lr, seed=data.seed)
    for number, rate in enumerate(rates, start=1):
        if not paper and number < checkpoints:
            continue
        gradients = port.sketches(target, size=size, seed=data.seed)
        directions = target_directions(gradients, labels, over="max" if paper else "mean")
        found = [
            cosines(port.sketches(window, size=size, seed=data.seed, as_adam=True), directions)
            for window in _windows(data.rows)
        ]
        total = total + (rate if paper else 1.0) * np.concatenate(found)
    return _scores(total.max(axis=1), "less")


def tracin(
    data: SelectionData, *, checkpoints: int, warmup: float, batch_size: int, lr: float, rank: int, target_rows: int
) -> Scores:
    """Score by the inner product of a row's gradient with the target's mean gradient, summed over checkpoints.

    The products are exact: nothing is projected. They grow with a row's gradient, so rows that
    the model finds hard stand at both ends.

    References
    ----------
    Pruthi et al. 2020, arXiv:2002.08484 (TracInCP).
    """
    port, warm, target = _prepare(data, rank, warmup, target_rows)
    total = np.zeros(len(data.rows))
    for rate in checkpoint_rates(port, warm, checkpoints=checkpoints, batch_size=batch_size, lr=lr, seed=data.seed):
        port.aim(target)
        total += rate * np.concatenate([port.alignments(window) for window in _windows(data.rows)])
    return _scores(total, "tracin")


def _prepare(
    data: SelectionData, rank: int, warmup: float, target_rows: int
) -> tuple[GradientPort, list[Row], list[Row]]:
    """The port, the rows of the warm-up, and those of the target."""
    assert data.target is not None  # the settings have seen to it
    warm = draw(data.rows, max(1, round(warmup * len(data.rows))), seed=data.seed, name="influence/warmup")
    target = draw(data.target, target_rows, seed=data.seed, name="influence/target")
    return data.open_gradients(rank), warm, target


def _windows(rows: RowTable) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while window := list(islice(iterator, WINDOW)):
        yield window


def _scores(values: Values, method: str) -> Scores:
    scored = np.where(np.isnan(values), -math.inf, values)
    return Scores(tuple(scored.tolist()), higher_is_better=True, method=method)
