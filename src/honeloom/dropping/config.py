"""Settings of `drop`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from honeloom.config.base import Attention, ModelInput, RowsConfig, RowsInput
from honeloom.config.methods import FamilyMethod
from honeloom.dropping.metric_config import CosineConfig, DropMetricConfig

__all__ = ["DropConfig", "DropMetric"]


DropMetric = Annotated[SerializeAsAny[DropMetricConfig], FamilyMethod("dropping", "cosine")]


class DropConfig(RowsConfig):
    """Drop attention, MLP or whole blocks."""

    model: ModelInput
    attention: int = Field(0, ge=0, description="How many attentions to drop.")
    mlp: int = Field(0, ge=0, description="How many MLPs to drop.")
    block: int = Field(0, ge=0, description="How many whole blocks to drop.")
    calibration: RowsInput = Field(min_length=1, description="Rows on which importance is measured.")
    metric: DropMetric = Field(default_factory=CosineConfig)
    profile: Literal["zero"] = Field(
        "zero", description="zero: output projections become 0; loads anywhere, saves nothing."
    )
    attn: Attention = None
    samples: int = Field(256, gt=0, description="At most this many calibration rows.")
    batch_size: int = Field(8, gt=0, description="Rows per forward pass.")
    max_length: int | None = Field(None, gt=1, description="Tokens per row; default: the model's limit, at most 2048.")

    @model_validator(mode="after")
    def _drops_something(self) -> DropConfig:
        if not (self.attention or self.mlp or self.block):
            raise ValueError("nothing to drop: give attention, mlp or block a number above 0")
        return self
