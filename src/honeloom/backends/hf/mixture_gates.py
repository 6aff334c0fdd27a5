"""Routers of mixtures: what they read, whom they choose, and how the parts of a batch come back together.

Shapes: B rows, T tokens, H width of the stream, E experts, N = B or B * T decisions of k experts
each, R width of a subspace. Gates are kept and computed in fp32, whatever the model's number type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Decision", "RouterSpec", "build_gate", "pool_states"]

INPUTS, TYPES, POOLINGS = ("token", "sample"), ("linear", "mlp", "subspace"), ("mean", "first")
RANK = 8
"""Directions per expert of a subspace gate whose `width` is not given."""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """The `router` of a mixture's config.json.

    Attributes
    ----------
    input : {"token", "sample"}
        One decision per token, or per row.
    type : {"linear", "mlp", "subspace"}
        Gate: scores are W x (+ b), D silu(U x) (+ b), or the norms of B_e x.
    width : int or None
        Hidden width of an mlp gate, directions per expert of a subspace gate.
    pooling : {"mean", "first"}
        What a row's decision reads of its prompt's tokens.
    prompt_tokens : int
        Tokens that count as the prompt of a row without one.
    bias : bool
        Whether a linear or mlp gate adds a bias.
    layer : int
        Of whole models only: -1 reads the encoder's embedding, i the output of its layer i.
    """

    input: str = "token"
    type: str = "linear"
    width: int | None = None
    pooling: str = "mean"
    prompt_tokens: int = 32
    bias: bool = False
    layer: int = -1

    def __post_init__(self) -> None:
        for name, allowed in (("input", INPUTS), ("type", TYPES), ("pooling", POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"router.{name} is {getattr(self, name)!r}, and must be one of {', '.join(allowed)}")
        if self.prompt_tokens < 1:
            raise ValueError(f"router.prompt_tokens is {self.prompt_tokens}, and must be at least 1")
        if self.type == "mlp" and not self.width:
            raise ValueError("router.type mlp needs router.width, the hidden width of the gate")
        if self.type == "subspace" and self.bias:
            raise ValueError("router.bias: a subspace gate has none; its scores are norms")

    @classmethod
    def read(cls, document: Mapping[str, Any] | None) -> RouterSpec:
        """Read the mapping of config.json; ValueError names a key or value that is not known."""
        given = dict(document or {})
        unknown = sorted(given.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(f"router.{unknown[0]} is not known; known: {', '.join(cls.__dataclass_fields__)}")
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Decision:
    """Which experts N rows or tokens go to, and with what weight.

    Attributes
    ----------
    experts : Tensor
        (N, k) int64, the likeliest first.
    weights : Tensor
        (N, k) float32, each row sums to 1.
    groups : tuple of (int, Tensor)
        Every expert that has work, and its rows (n,) in ascending order.
    inverse : Tensor
        (N * k,): place of every assignment among the groups' rows laid end to end.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    groups: tuple[tuple[int, torch.Tensor], ...]
    inverse: torch.Tensor

    @classmethod
    def of_scores(cls, scores_NE: torch.Tensor, k: int) -> Decision:
        """Softmax over all experts, the k likeliest (ties go to the first), weights that sum to 1."""
        chances, order = torch.softmax(scores_NE.float(), dim=-1).sort(dim=-1, descending=True, stable=True)
        weights = chances[:, :k]
        return cls.of_experts(order[:, :k], weights / weights.sum(dim=-1, keepdim=True), scores_NE.shape[-1])

    @classmethod
    def of_experts(cls, experts_Nk: torch.Tensor, weights_Nk: torch.Tensor, count: int) -> Decision:
        """Group given choices among `count` experts."""
        k, flat = experts_Nk.shape[1], experts_Nk.reshape(-1)
        order = flat.argsort(stable=True)
        sizes = flat.bincount(minlength=count).tolist()
        rows = (order // k).split(sizes)
        groups = tuple((e, r) for e, r in enumerate(rows) if len(r))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return cls(experts_Nk, weights_Nk, groups, inverse)

    @property
    def single(self) -> int | None:
        """The one expert that all rows go to, with weight 1; None if there are several."""
        return self.groups[0][0] if len(self.groups) == 1 and self.experts.shape[1] == 1 else None

    def rows_of(self, expert: int) -> torch.Tensor:
        """Rows (n,) of an expert, in ascending order; none where it has no work."""
        return next((rows for e, rows in self.groups if e == expert), self.inverse[:0])

    def combine(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Weighted sums (N, ...) of the groups' outputs, each (n, ...), given in the groups' order.

        Sums of several experts are taken in fp32. The order of summands is fixed, so bits do not
        depend on the device's scheduling.
        """
        laid = torch.cat(list(parts)).index_select(0, self.inverse.to(parts[0].device))
        k = self.experts.shape[1]
        if k == 1:
            return laid
        chosen = laid.unflatten(0, (-1, k)).float()
        weights = self.weights.to(chosen.device).reshape(-1, k, *(1,) * (chosen.ndim - 2))
        return (chosen * weights).sum(dim=1).to(laid.dtype)


def pool_states(states_BTH: torch.Tensor, mask_BT: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """What a row's decision reads: mean over the marked tokens, or the first of them: (B, H) in fp32.

    Without a mask all tokens count. What stands at unmarked places does not matter, not even NaN.
    """
    if mask_BT is None:
        return states_BTH.float().mean(dim=1) if pooling == "mean" else states_BTH[:, 0].float()
    mask_BT = mask_BT.to(states_BTH.device)
    if pooling == "first":
        first = mask_BT.int().argmax(dim=1)
        return states_BTH[torch.arange(len(first), device=first.device), first].float()
    kept = states_BTH.float().masked_fill(~mask_BT.unsqueeze(-1), 0.0)
    return kept.sum(dim=1) / mask_BT.sum(dim=1, keepdim=True)


class Projection(nn.Module):
    """A matrix (out, in) with an optional bias; not `nn.Linear`, so that no quantiser replaces it."""

    def __init__(self, out: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out, dtype=torch.float32)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + b in fp32."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias)


class MlpGate(nn.Module):
    """Scores of two layers with SiLU between them."""

    def __init__(self, experts: int, hidden: int, width: int, bias: bool) -> None:
        super().__init__()
        self.up = Projection(width, hidden, bias=False)
        self.down = Projection(experts, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (N, E) of vectors (N, H)."""
        return self.down(nn.functional.silu(self.up(x)))


class SubspaceGate(nn.Module):
    """Scores by how much of a vector lies in each expert's subspace (arXiv:2408.10174)."""

    def __init__(self, experts: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.zeros(experts, rank, hidden, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (N, E) of vectors (N, H)."""
        inside = nn.functional.linear(x.float(), self.basis.float().flatten(0, 1))
        return torch.linalg.vector_norm(inside.unflatten(-1, self.basis.shape[:2]), dim=-1)


def build_gate(spec: RouterSpec, experts: int, hidden: int) -> nn.Module:
    """An untrained gate, all zeros: every expert is as likely as any other.

    Its parameters are `weight` (E, H) and `bias` (E,); `up.weight` (W, H), `down.weight` (E, W)
    and `down.bias` (E,); or `basis` (E, R, H).
    """
    if spec.type == "mlp":
        return MlpGate(experts, hidden, spec.width or 0, spec.bias)
    if spec.type == "subspace":
        return SubspaceGate(experts, hidden, spec.width or RANK)
    return Projection(experts, hidden, spec.bias)
