"""Settings of `aggregate` and of each aggregation rule."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema, model_validator

from honeloom.config.base import AdaptersInput, OptionalModelInput, VerbConfig
from honeloom.config.methods import FamilyMethod, MethodConfig

__all__ = [
    "AggregateConfig", "AggregationRule", "FedExConfig", "FedItConfig", "FfaConfig", "FlexLoraConfig", "FloraConfig",
    "RoLoraConfig", "SvdConfig", "ZeroPadConfig",
]  # fmt: skip


class FloraConfig(MethodConfig):
    """Stack the factors: exact."""

    type: Literal["flora"] = "flora"


class SvdConfig(MethodConfig):
    """Best approximation of the sum."""

    type: Literal["svd"] = "svd"
    rank: int | None = Field(
        None, ge=1, description="Columns to keep. Default: as many as the largest client has, unless energy is given."
    )
    energy: float | None = Field(
        None, gt=0, le=1, description="Keep as few columns as hold this share of the squared norm, in every module."
    )


class FlexLoraConfig(MethodConfig):
    """Best approximation of the sum at one client's rank."""

    type: Literal["flexlora"] = "flexlora"
    rank: int | None = Field(None, ge=1, description="Rank of the client that downloads. Default: the largest.")


class FedItConfig(MethodConfig):
    """Average B and A apart."""

    type: Literal["fedit"] = "fedit"


class ZeroPadConfig(MethodConfig):
    """Pad with zeros, then average B and A apart."""

    type: Literal["zero_pad"] = "zero_pad"
    norm_weights: bool = Field(
        False, description="Weigh clients by the norm of their update in the module instead of by their share."
    )


class FfaConfig(MethodConfig):
    """One frozen A, average B."""

    type: Literal["ffa"] = "ffa"


class RoLoraConfig(MethodConfig):
    """One shared factor, average the other."""

    type: Literal["rolora"] = "rolora"


class FedExConfig(MethodConfig):
    """Average B and A apart, with the residual."""

    type: Literal["fedex"] = "fedex"


AggregationRule = Annotated[SerializeAsAny[MethodConfig], FamilyMethod("aggregation", "svd")]
"""Any rule of the family, plug-ins included; `svd` by default."""


def _as_numbers(value: Any) -> Any:
    """Accept "50,30,20" as on the command line."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise ValueError("give one number per adapter, like 50,30,20") from None


_NUMBERS = {
    "anyOf": [
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 1},
        {"type": "string", "pattern": r"^[0-9.eE+,\- ]+$"},
    ]
}
Weights = Annotated[tuple[float, ...], BeforeValidator(_as_numbers), WithJsonSchema(_NUMBERS, mode="validation")]


class AggregateConfig(VerbConfig):
    """Combine PEFT LoRA adapters of one base into one adapter, or into the base."""

    adapters: AdaptersInput = Field(min_length=1, description="PEFT LoRA adapter folders or hub ids of one base model.")
    weights: Weights | None = Field(
        None, description="One positive number per adapter, such as its rows; divided by their sum. Default: equal."
    )
    scale: float = Field(
        1.0,
        description="Multiplier on the combined update, not 0. Equal weights and the number of adapters give the sum.",
    )
    method: AggregationRule = Field(default_factory=SvdConfig, description="The rule, by name or with its settings.")
    into_base: OptionalModelInput = Field(
        None, description="Write this base model with the update added, instead of an adapter."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Of the output; auto is fp32 for an adapter and keeps the base's types for a model."
    )

    @model_validator(mode="after")
    def _fits(self) -> AggregateConfig:
        if self.scale == 0:
            raise ValueError("scale: 0 leaves nothing of the update; use any other number, 1 for the weighted average")
        if self.weights is None:
            return self
        if len(self.weights) != len(self.adapters):
            raise ValueError(
                f"weights: {len(self.weights)} numbers for {len(self.adapters)} adapters; give one for each"
            )
        wrong = [w for w in self.weights if not w > 0 or not math.isfinite(w)]
        if wrong:
            raise ValueError(f"weights: {wrong[0]} is not a positive number; leave an adapter out to give it no weight")
        return self

    def shares(self) -> tuple[float, ...]:
        """The weights divided by their sum, one per adapter."""
        weights = self.weights or (1.0,) * len(self.adapters)
        total = math.fsum(weights)
        return tuple(w / total for w in weights)
