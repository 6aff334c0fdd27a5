"""Settings of the routers; those of the command are in `config`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from honeloom.config.base import RowsInput
from honeloom.config.methods import MethodConfig

__all__ = [
    "ClustersRouterConfig", "PromptsRouterConfig", "RandomRouterConfig", "RouterConfig", "RowsRouterConfig",
    "SmileRouterConfig",
]  # fmt: skip

_SCALE = "Multiplier on the gate: how far the largest score stands above the others before the softmax."
_SHRINKAGE = "Weight of the identity in the covariance; default: the estimate of Ledoit and Wolf."
_EXAMPLES = "Rows at most, of each expert's or in all."
_TOKENS = "Tokens of each row that a router of tokens learns from, evenly spaced."


class RouterConfig(MethodConfig):
    """What the command must know of a router."""

    data: ClassVar[Literal["none", "prompts", "rows", "changes"]] = "none"
    """What it is made from."""
    kind: ClassVar[Literal["linear", "subspace"]] = "linear"
    """The gate that it gives."""
    measured: ClassVar[frozenset[str]] = frozenset()
    """Settings of how that is measured; the router itself does not take them."""


class RandomRouterConfig(RouterConfig):
    """Random directions."""

    type: Literal["random"] = "random"
    scale: float = Field(1.0, gt=0, description=_SCALE)


class PromptsRouterConfig(RouterConfig):
    """Directions of prompts."""

    data, measured = "prompts", frozenset({"pooling"})
    type: Literal["prompts"] = "prompts"
    pooling: Literal["mean", "last"] = Field(
        "mean", description="Of a prompt's tokens: their mean, or the last one; the gate of a sample pools as it does."
    )
    scale: float = Field(1.0, gt=0, description=_SCALE)


class RowsRouterConfig(RouterConfig):
    """Discriminants between the rows of each expert's domain."""

    data, measured = "rows", frozenset({"rows", "examples", "tokens_per_row"})
    type: Literal["rows"] = "rows"
    rows: RowsInput = Field(
        (), description="Rows without a known expert, instead of experts[].rows: each is the expert's with least loss."
    )
    examples: int = Field(256, ge=4, description=_EXAMPLES)
    tokens_per_row: int = Field(8, ge=1, description=_TOKENS)
    shrinkage: float | None = Field(None, ge=0, le=1, description=_SHRINKAGE)
    folds: int = Field(4, ge=2, description="Parts of the rows in the cross-validation of the accuracy.")
    scale: float = Field(1.0, gt=0, description=_SCALE)


class ClustersRouterConfig(RouterConfig):
    """Discriminants between groups that k-means finds."""

    data, measured = "rows", frozenset({"rows", "examples", "tokens_per_row"})
    type: Literal["clusters"] = "clusters"
    rows: RowsInput = Field(min_length=1, description="Rows of all domains, without labels.")
    examples: int = Field(512, ge=4, description=_EXAMPLES)
    tokens_per_row: int = Field(8, ge=1, description=_TOKENS)
    shrinkage: float | None = Field(None, ge=0, le=1, description=_SHRINKAGE)
    folds: int = Field(4, ge=2, description="Parts of the rows in the cross-validation of the accuracy.")
    restarts: int = Field(8, ge=1, description="Beginnings of k-means; the one of least inertia counts.")
    scale: float = Field(1.0, gt=0, description=_SCALE)


class SmileRouterConfig(RouterConfig):
    """Leading directions of the experts' task vectors."""

    data, kind = "changes", "subspace"
    type: Literal["smile"] = "smile"
    rank: int = Field(8, ge=1, description="Directions of each expert (the paper's rank of the router).")
    scale: float = Field(1.0, gt=0, description=_SCALE)
