"""First-order in-run Shapley values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from honeloom.ops.noise import keyed_uniform
from honeloom.types.plans import Scores
from honeloom.types.ports import GradientPort, RowTable, SelectionData
from honeloom.types.rows import Row

__all__ = ["draw", "first_order_values", "in_run", "row_batches"]

Values = npt.NDArray[np.float64]


def draw(rows: RowTable, count: int, *, seed: int, name: str) -> list[Row]:
    """At most `count` rows drawn by seed and row id, whatever the order of the rows; in the order of the draw."""
    ids = rows.ids
    keys = keyed_uniform(seed, name, ids)
    chosen = sorted(range(len(ids)), key=lambda i: (keys[i], ids[i]))[:count]
    wanted = set(chosen)
    found = {i: row for i, row in enumerate(rows) if i in wanted}
    return [found[i] for i in chosen]


def first_order_values(
    port: GradientPort, rows: Sequence[Row], target: Sequence[Row], *, epochs: int, batch_size: int, lr: float,
    seed: int,
) -> Values:  # fmt: skip
    """What every row does for the target's loss along one tuning, to first order.

    A step on the mean loss of a batch B lowers the target's loss by about
    lr <mean gradient of B, P g>, with g the target's gradient and P the optimizer's diagonal scale
    (the identity for SGD). That is a sum over the rows of B, so the Shapley value of row i in
    the step is its term, lr <g_i, P g> / |B|. Values add up over steps, and every row is in
    `epochs` of them.

    Early steps teach more than late ones, whichever rows they hold. A step's mean value is
    therefore shared by all rows of the epoch: that is the mean over all orders, keeps the
    sum, and leaves out the luck of being drawn early.

    The target's gradient is taken over all its rows, and anew only once every
    ceil(len(target) / batch_size) steps, so that it costs what the training costs: two runs in all.

    Parameters
    ----------
    port : GradientPort
        Is reset first.
    rows, target : sequence of Row
        Those trained on, and those whose loss counts.
    epochs : int
        Passes over the rows, each in an order drawn by seed and row id.
    batch_size : int
        Rows per step.
    lr : float
        Learning rate, falling linearly to zero.
    seed : int
        Of the orders.

    Returns
    -------
    ndarray
        Shape (n,): nats per token by which the row lowers the target's mean loss; NaN for rows
        without a scored token.

    References
    ----------
    Wang et al. 2025, arXiv:2406.11011, section 3 (first order, for SGD; the scale of Adam is an addition).
    """
    port.reset()
    batches = row_batches([row.id for row in rows], epochs, batch_size, seed)
    again = math.ceil(len(target) / batch_size)
    values, shared = np.zeros(len(rows)), 0.0
    for step, batch in enumerate(batches):
        if step % again == 0:
            port.aim(target)
        owed = port.train([rows[i] for i in batch], lr=lr * (1 - step / len(batches)))
        scored = np.isfinite(owed)
        common = float(owed[scored].mean()) if scored.any() else 0.0
        values[batch] += owed - common
        shared += common * float(scored.sum())
    return values + shared / max(1, int(np.isfinite(values).sum()))


def row_batches(ids: Sequence[str], epochs: int, batch_size: int, seed: int) -> list[list[int]]:
    """Places of the rows of every step: each epoch in an order drawn by seed and row id, whatever the rows' order."""
    found = []
    for epoch in range(epochs):
        keys = keyed_uniform(seed, f"tune/epoch/{epoch}", ids)
        order = sorted(range(len(ids)), key=lambda i: (keys[i], ids[i]))
        found += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return found


def in_run(data: SelectionData, *, epochs: int, batch_size: int, lr: float, rank: int, target_rows: int) -> Scores:
    """Score by what the row does for the target's loss along one tuning of LoRA adapters on all rows.

    References
    ----------
    Wang et al. 2025, arXiv:2406.11011 (Data Shapley in One Training Run).
    """
    assert data.target is not None  # the settings have seen to it
    target = draw(data.target, target_rows, seed=data.seed, name="in_run/target")
    values = first_order_values(
        data.open_gradients(rank), list(data.rows), target, epochs=epochs, batch_size=batch_size, lr=lr, seed=data.seed
    )
    scored = np.where(np.isnan(values), -math.inf, values)
    return Scores(tuple(scored.tolist()), higher_is_better=True, method="in_run")
