"""A small training loop for a model that stays resident: fixed steps, batches given, state reset in place.

Federated clients and utility evaluations tune the same model many times for a few steps;
this loop does that without the set-up of a trainer. `tune.train` builds its optimizer and
schedule with the same functions, and a test holds the two to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import get_scheduler

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.score import pack_batch, pad_batch
from honeloom.errors import NotFiniteError
from honeloom.tuning.config import AdamWConfig, Optimizer

__all__ = ["build_optimizer", "build_schedule", "collator", "local_steps", "restore_trainable", "trainable_state"]

Collator = Callable[[Sequence[Encoded]], dict[str, torch.Tensor]]
Schedule = torch.optim.lr_scheduler.LRScheduler


def build_optimizer(model: torch.nn.Module, config: Optimizer, lr: float) -> torch.optim.Optimizer:
    """Optimizer over the trainable parameters; weight decay only on matrices."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)


def build_schedule(optimizer: torch.optim.Optimizer, name: str, steps: int, warmup_ratio: float) -> Schedule:
    """Learning rate schedule over `steps` optimizer steps with a linear warm-up."""
    warmup = round(steps * warmup_ratio)
    kind = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def collator(packing: bool, rows: Sequence[Encoded]) -> Collator:
    """How a batch becomes tensors: padded, or packed into sequences no longer than the longest of `rows`."""
    return partial(_packed, width=max(len(e.ids) for e in rows)) if packing else _padded


def _padded(batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    ids, mask, labels = pad_batch(batch, torch.device("cpu"))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _packed(batch: Sequence[Encoded], width: int) -> dict[str, torch.Tensor]:
    """Without a mask: transformers keeps attention within a row by the positions."""
    ids, positions, labels = pack_batch(batch, width)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def local_steps(
    model: Any,
    batches: Iterable[Sequence[Sequence[Encoded]]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule | None = None,
    *,
    max_grad_norm: float = 1.0,
    collate: Collator = _padded,
    adjust: Callable[[], None] | None = None,
) -> list[float]:
    """Train for as many optimizer steps as there are batches.

    Parameters
    ----------
    model : transformers or PEFT model
        Its trainable parameters are changed in place.
    batches : iterable of sequence of sequence of Encoded
        Per optimizer step, its forward passes, each a list of rows.
    optimizer, schedule
        From `build_optimizer` and `build_schedule`.
    max_grad_norm : float
        Gradients are scaled down to this L2 norm.
    collate : callable
        From `collator`.
    adjust : callable, optional
        May change the gradients of a step before they are clipped.

    Returns
    -------
    list of float
        Loss of every step before its update, in nats per target token.

    Raises
    ------
    NotFiniteError
        A loss is NaN or infinite; the step is not taken.
    """
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for number, passes in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        targets = sum(sum(e.scored[1:]) for rows in passes for e in rows)
        total = 0.0
        for rows in passes:
            inputs = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
            loss = model(**inputs, num_items_in_batch=targets).loss
            loss.backward()
            total += float(loss.detach())
        if not torch.isfinite(torch.tensor(total)):
            raise NotFiniteError(f"step {number}: the loss is {total}; lower lr or use --dtype fp32")
        if adjust is not None:
            adjust()
        torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(total)
    model.eval()
    return losses


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_trainable(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put copies from `trainable_state` back in place, bit for bit."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(state[name])
