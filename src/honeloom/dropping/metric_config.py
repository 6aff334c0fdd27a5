"""Settings of importance metrics, and what each reads of a model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from honeloom.config.methods import MethodConfig
from honeloom.dropping.scores import KINDS, Kind

__all__ = [
    "AngularConfig",
    "BlockInfluenceConfig",
    "CosineConfig",
    "DropMetricConfig",
    "FirstConfig",
    "KlConfig",
    "LastConfig",
    "MagnitudeConfig",
    "PerplexityConfig",
    "RandomConfig",
    "TaylorConfig",
]


class DropMetricConfig(MethodConfig):
    """Settings of an importance metric.

    `reads` says what its function is called with: "streams", the residual stream (..., D) before and after a unit;
    "losses" or "logits", those of the whole model and of the model without the unit; "gradients", the gradient of
    the loss by the stream after a unit and the unit's change; "places", only which unit it is. `measured` names
    settings of the measuring around the function, which does not take them.
    """

    reads: ClassVar[Literal["streams", "losses", "logits", "gradients", "places"]] = "streams"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    last_token: ClassVar[bool] = False
    measured: ClassVar[frozenset[str]] = frozenset()


class StreamConfig(DropMetricConfig):
    """A mean over tokens."""

    measured: ClassVar[frozenset[str]] = frozenset({"skip_first_tokens"})
    skip_first_tokens: int = Field(
        0, ge=0, description="Leave out this many tokens at the start of every row, where attention sinks lie."
    )


class CosineConfig(StreamConfig):
    """1 - mean cosine of the residual stream before and after a unit."""

    type: Literal["cosine"] = "cosine"


class BlockInfluenceConfig(StreamConfig):
    """1 - mean cosine of the residual stream before and after a block; whole blocks alone."""

    kinds: ClassVar[tuple[Kind, ...]] = ("block",)
    type: Literal["block_influence"] = "block_influence"


class MagnitudeConfig(StreamConfig):
    """Length of a unit's contribution relative to the stream that it is added to."""

    type: Literal["magnitude"] = "magnitude"


class AngularConfig(DropMetricConfig):
    """Angle between the stream before and after a unit at the last token of a row, in half turns."""

    last_token: ClassVar[bool] = True
    type: Literal["angular"] = "angular"


class PerplexityConfig(DropMetricConfig):
    """By how much the loss rises without a unit, in nats per scored token."""

    reads: ClassVar[Literal["losses"]] = "losses"
    type: Literal["perplexity"] = "perplexity"


class KlConfig(StreamConfig):
    """Kullback-Leibler divergence of the next token without a unit from that of the whole model, in nats."""

    reads: ClassVar[Literal["logits"]] = "logits"
    type: Literal["kl"] = "kl"


class TaylorConfig(DropMetricConfig):
    """First-order estimate of the change of the loss without a unit, its size in nats per scored token."""

    reads: ClassVar[Literal["gradients"]] = "gradients"
    type: Literal["taylor"] = "taylor"


class RandomConfig(DropMetricConfig):
    """Uniform numbers: the baseline that every metric has to beat."""

    reads: ClassVar[Literal["places"]] = "places"
    type: Literal["random"] = "random"
    seed: int = Field(0, ge=0, lt=1 << 64, description="Of the numbers.")


class LastConfig(DropMetricConfig):
    """The last layers go first."""

    reads: ClassVar[Literal["places"]] = "places"
    type: Literal["last"] = "last"


class FirstConfig(DropMetricConfig):
    """The first layers go first."""

    reads: ClassVar[Literal["places"]] = "places"
    type: Literal["first"] = "first"
