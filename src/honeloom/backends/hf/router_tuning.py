"""Training of a mixture's gates: cross-entropy on rows, everything else as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import build_optimizer, collator, local_steps
from honeloom.errors import CheckpointError, NotFiniteError
from honeloom.ops.noise import permutation
from honeloom.tuning.config import AdamWConfig

__all__ = ["gate_names", "order_of_rows", "tune_by_losses", "tune_gates"]

_GATE = re.compile(r"(?:^|\.)gate\.(?:weight|bias|basis|up\.weight|down\.weight|down\.bias)$")


def gate_names(model: Any) -> list[str]:
    """Names of the parameters of a mixture's gates."""
    return [name for name, _ in model.named_parameters() if _GATE.search(name)]


def order_of_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """Indices of rows in training order: a fresh permutation for every pass over them."""
    order: list[int] = []
    while len(order) < wanted:
        order += permutation(seed, f"routing/epoch/{len(order) // rows}", rows).tolist()
    return order[:wanted]


def tune_gates(
    model: Any, rows: Sequence[Encoded], *, steps: int, batch_size: int, lr: float, seed: int,
    all_experts: Callable[[], None], read: Callable[[Encoded], int] | None,
) -> list[float]:  # fmt: skip
    """Train the gates of a loaded mixture by the loss of its own predictions.

    Parameters
    ----------
    model : transformers model
        In float32. Its gates are changed, all other weights stay.
    rows : sequence of Encoded
        Each with a target.
    steps, batch_size, lr, seed
        Of AdamW without weight decay; the rows come in a seeded order.
    all_experts : callable
        Called before the first step where one expert at a time is chosen: its weight is then 1 whatever its score, so
        that no gradient reaches the gate; it must make the model weigh all experts.
    read : callable or None
        First tokens of a row that decide for it, where whole rows are routed: the answer must not.

    Returns
    -------
    list of float
        Loss of every step, in nats per token.

    Raises
    ------
    CheckpointError
        The model has no gates.
    NotFiniteError
        A loss is NaN or infinite.
    """
    names = gate_names(model)
    if not names:
        raise CheckpointError(f"{type(model).__name__} has no gates to train")
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    all_experts()
    order = order_of_rows(len(rows), steps * batch_size, seed)
    batches = [[[rows[i] for i in order[s * batch_size : (s + 1) * batch_size]]] for s in range(steps)]
    settings = AdamWConfig(type="adamw", weight_decay=0.0)
    optimizer = build_optimizer(model, settings, lr)
    padded = collator(False, rows)

    def collate(batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        inputs = padded(batch)
        if read is None:
            return inputs
        counts = torch.tensor([read(row) for row in batch])
        places = torch.arange(inputs["input_ids"].shape[1])
        return {**inputs, "routing_mask": (places < counts[:, None]).long()}

    losses = local_steps(model, batches, optimizer, collate=collate)
    model.requires_grad_(False)
    return losses


def tune_by_losses(
    gate: Any, vectors: torch.Tensor, losses: torch.Tensor, *, steps: int, batch_size: int, lr: float, seed: int
) -> list[float]:  # fmt: skip
    """Train a gate that chooses one expert for a row, by the loss to be expected of its choice.

    What an expert predicts does not depend on the gate, so sum_e p_e(row) loss_e(row) has an exact gradient, and no
    expert is computed again.

    Parameters
    ----------
    gate : Module
        (B, H) to scores (B, E); trained in place.
    vectors : Tensor
        (R, H), what it receives for each row.
    losses : Tensor
        (R, E), each row's loss under each expert, in one unit.
    steps, batch_size, lr, seed
        Of AdamW without weight decay.

    Returns
    -------
    list of float
        Expected loss of every step.
    """
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    order = order_of_rows(len(vectors), steps * batch_size, seed)
    told = []
    for step in range(steps):
        picked = torch.tensor(order[step * batch_size : (step + 1) * batch_size])
        shares = gate(vectors[picked]).softmax(dim=-1)
        loss = (shares * losses[picked].to(shares.dtype)).sum(dim=-1).mean()
        if not bool(torch.isfinite(loss)):
            raise NotFiniteError(f"step {step + 1}: the expected loss is {float(loss.detach())}; lower tune_router.lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(float(loss.detach()))
    return told
