"""Which experts a mixture uses: standard ones tell by their routers, our own by their decisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["expert_shares", "held_to", "pad_rows", "weigh_all"]

_FAR = 1e4
"""Score of an expert that is held; softmax makes every other one's share 0 exactly."""


def _gates(model: Any) -> dict[str, Any]:
    """The routers of a mixture by their names."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "gate"}


@contextmanager
def held_to(model: Any, expert: int) -> Iterator[None]:
    """Have every gate choose one expert, with weight 1."""

    def hold(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # of transformers: logits, weights, experts
            logits, weights, chosen = output
            others = [e for e in range(logits.shape[-1]) if e != expert][: chosen.shape[-1] - 1]
            only = torch.zeros_like(weights)
            only[..., 0] = 1.0
            return logits, only, torch.tensor([expert, *others], device=chosen.device).expand_as(chosen)
        scores = torch.full_like(output, -_FAR)
        scores[..., expert] = _FAR
        return scores

    handles = [gate.register_forward_hook(hold) for gate in _gates(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weigh_all(model: Any, experts: int) -> None:
    """Have every routed module weigh all experts instead of choosing some."""
    for module in model.modules():
        if isinstance(getattr(module, "top_k", None), int):
            module.top_k = experts


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask (B, T), padded right."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def expert_shares(model: Any, experts: int, rows: Sequence[Sequence[int]], read: Sequence[int]) -> torch.Tensor:
    """Weight that each expert has for each row, over all gates and, where tokens are routed, all tokens.

    Parameters
    ----------
    model : transformers model
        A mixture with a trunk, streamed or loaded.
    experts : int
        E.
    rows : sequence of sequence of int
        R rows of token ids.
    read : sequence of int
        First tokens of each row that a router of samples reads.

    Returns
    -------
    Tensor
        (R, E), float64; rows sum to 1.
    """
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    ids, mask = pad_rows(rows, device)
    routing = torch.zeros_like(mask)
    for i, count in enumerate(read):
        routing[i, :count] = 1
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = hasattr(model, "last_decisions")

    def see(module: Any, args: Any, output: Any) -> None:
        chosen.append((output[2], output[1]))

    handles = [] if own else [gate.register_forward_hook(see) for gate in _gates(model).values()]
    extra = {"routing_mask": routing} if own else {}
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1, **extra)
    finally:
        for handle in handles:
            handle.remove()
    if own:
        chosen = [(decision.experts, decision.weights) for decision in model.last_decisions.values()]
    return _summed(chosen, experts, mask)


def _summed(chosen: Sequence[tuple[torch.Tensor, torch.Tensor]], experts: int, mask: torch.Tensor) -> torch.Tensor:
    """Weights (R, E) of some gates' choices, each (N, k) experts and weights of rows or tokens."""
    sums = torch.zeros(len(mask), experts, dtype=torch.float64)
    for picked, weights in chosen:
        given = torch.zeros(len(picked), experts, dtype=torch.float64)
        given.scatter_add_(1, picked.cpu(), weights.cpu().double())
        if len(given) != len(mask):
            given = (given.view(*mask.shape, experts) * mask.cpu()[..., None]).sum(dim=1)
        sums += given
    return sums / sums.sum(dim=1, keepdim=True)
