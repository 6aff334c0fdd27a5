"""Settings of `extract-lora`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from honeloom.config.base import ModelInput, VerbConfig

__all__ = ["DEFAULT_RANK", "ExtractConfig"]

DEFAULT_RANK = 16
"""The largest rank that vLLM loads unless it is told more."""


def _check_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"no regular expression: {error}; give all-linear, or one that a whole module path matches, such as "
            r"'.*\.(q_proj|v_proj)'"
        ) from None
    return value


class ExtractConfig(VerbConfig):
    """The low-rank difference of two models, as a PEFT adapter of one of them."""

    tuned: ModelInput = Field(description="The model that base and adapter together stand for.")
    base: ModelInput = Field(description="The model that the adapter will be loaded on.")
    rank: int | None = Field(
        None, ge=1, description=f"Columns per module at most. Default: {DEFAULT_RANK}; no limit where energy is given."
    )
    energy: float | None = Field(
        None, gt=0, le=1, description="Keep as few columns as hold this share of the squared norm, in every module."
    )
    targets: Annotated[str, AfterValidator(_check_pattern)] = Field(
        "all-linear",
        description="all-linear, or a regular expression: the linear modules of the decoder layers whose whole path "
        "matches.",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="Of the factors; auto is fp32.")

    def amount(self) -> dict[str, Any]:
        """Rank and energy as `extract_factors` takes them: the default rank where nothing is given."""
        unlimited = self.rank is None and self.energy is None
        return {"rank": DEFAULT_RANK if unlimited else self.rank, "energy": self.energy}
