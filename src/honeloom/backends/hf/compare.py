"""Comparing two models by their logits: the proof that a written model is the one meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "divergence", "finite_logits", "largest_gap", "logits_gap", "packing_leak", "probe_ids", "row_logits", "spread",
]  # fmt: skip


@torch.inference_mode()
def row_logits(model: Any, rows: Sequence[Sequence[int]], device: torch.device | None = None) -> list[torch.Tensor]:
    """Logits (T, V) of some rows of token ids, in fp32 on the host; `device` where the model's is not its input's."""
    where = device or model.device
    return [model(input_ids=torch.tensor([row], device=where), use_cache=False).logits[0].float().cpu() for row in rows]


def largest_gap(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of logits of the same rows; infinity if any is NaN."""
    gaps = [float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]
    return max((gap if gap == gap else float("inf") for gap in gaps), default=0.0)


def logits_gap(one: Any, other: Any, rows: Sequence[Sequence[int]]) -> float:
    """Largest absolute difference of two models' logits over some rows of token ids; infinity if any is NaN."""
    return largest_gap(row_logits(one, rows), row_logits(other, rows))


@torch.inference_mode()
def packing_leak(model: Any, one: Sequence[int], other: Sequence[int]) -> float:
    """Largest change of a row's logits when the row packed before it becomes another one of the same length.

    0 where attention stays inside a row: a masked key has weight 0 exactly.
    """
    changed = [*one[1:], one[0]] if len(set(one)) > 1 else [one[0] ^ 1] * len(one)
    positions = torch.tensor([[*range(len(one)), *range(len(other))]], device=model.device)
    logits = []
    for first in (list(one), changed):
        ids = torch.tensor([[*first, *other]], device=model.device)
        logits.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, len(one) :].float())
    gap = float((logits[0] - logits[1]).abs().max())
    return gap if gap == gap else float("inf")


@torch.inference_mode()
def finite_logits(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether every logit over some rows of token ids is finite."""
    return all(
        bool(torch.isfinite(model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits).all())
        for row in rows
    )


def probe_ids(tokenizer: Any, config: Any, seed: int, texts: Sequence[str] = ()) -> list[list[int]]:
    """Token ids for checks: of some texts if there is a tokenizer, else seeded ones."""
    if tokenizer is not None:
        sample = texts or ("Once upon a time there was a small town by the sea.", "What is two plus two? It is four.")
        return [list(tokenizer(text)["input_ids"])[:256] or [0] for text in sample]
    generator = torch.Generator().manual_seed(seed)
    size = config.get_text_config().vocab_size
    return torch.randint(0, size, (2, 32), generator=generator).tolist()


def divergence(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Mean KL divergence of the next token in nats, from the first logits to the second; infinity if any is NaN."""
    values = []
    for one, other in zip(expected, found, strict=True):
        log_p, log_q = one.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
        values.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    mean = float(torch.cat(values).mean())
    return mean if mean == mean else float("inf")


def spread(logits: Sequence[torch.Tensor]) -> float:
    """Standard deviation of logits over all positions and tokens."""
    return float(torch.cat([part.flatten() for part in logits]).std())
