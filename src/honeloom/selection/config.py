"""Settings of `select` and of each selection method."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, WithJsonSchema, field_validator, model_validator

from honeloom.config.base import Attention, LoadIn, OptionalModelInput, RowsConfig, RowsInput
from honeloom.config.methods import FamilyMethod, MethodConfig

__all__ = [
    "IfdConfig",
    "LengthConfig",
    "PerplexityConfig",
    "RandomConfig",
    "SelectConfig",
    "SelectMethod",
    "StratifiedConfig",
]


class RandomConfig(MethodConfig):
    """Uniform choice without replacement."""

    type: Literal["random"] = "random"


class StratifiedConfig(MethodConfig):
    """Random choice with the same share of every stratum."""

    type: Literal["stratified"] = "stratified"
    by: Literal["domain", "source"] = Field("domain", description="The label that defines the strata.")


class LengthConfig(MethodConfig):
    """The longest (or shortest) responses."""

    type: Literal["length"] = "length"
    order: Literal["longest", "shortest"] = "longest"


class PerplexityConfig(MethodConfig):
    """A band of the model's perplexity of the response."""

    type: Literal["perplexity"] = "perplexity"
    band: Literal["low", "middle", "high"] = Field(
        "middle", description="Which part of the distribution is kept; the middle avoids the trivial and the broken."
    )


class IfdConfig(MethodConfig):
    """The highest instruction-following difficulty below 1."""

    type: Literal["ifd"] = "ifd"


SelectMethod = Annotated[SerializeAsAny[MethodConfig], FamilyMethod("selection", "random")]
NEEDS_MODEL = frozenset({"length", "perplexity", "ifd"})
Keep = Annotated[str, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}]})]
_KEEP = re.compile(r"^(\d+(?:\.\d+)?)(%|tok)?$")


class SelectConfig(RowsConfig):
    """Choose the rows worth training on."""

    rows: RowsInput = Field(min_length=1, description="Rows to choose from.")
    method: SelectMethod = Field(default_factory=RandomConfig)
    model: OptionalModelInput = Field(None, description="Scores the rows; its tokenizer counts tokens.")
    keep: Keep = Field("10%", description="A share of the usable rows (10%), a count (500) or tokens (200000tok).")
    near_duplicates: float | None = Field(None, gt=0, le=1, description="Also reject rows this similar (Jaccard).")
    load_in: LoadIn = None
    attn: Attention = None
    batch_size: int = Field(16, gt=0, description="Rows per forward pass.")
    max_length: int | None = Field(None, gt=1, description="Tokens per row; default: the model's limit, at most 2048.")

    @field_validator("keep", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        text = str(value)
        match = _KEEP.match(text)
        if not match:
            raise ValueError("use a share like 10%, a count like 500, or tokens like 200000tok")
        amount, unit = float(match[1]), match[2]
        if amount <= 0 or (unit == "%" and amount > 100) or (unit != "%" and amount != int(amount)):
            raise ValueError("a share lies in (0%, 100%]; counts and tokens are whole numbers above 0")
        return text

    @model_validator(mode="after")
    def _has_model(self) -> SelectConfig:
        if self.model is None and (self.method.type in NEEDS_MODEL or self.keep.endswith("tok")):
            what = f"method {self.method.type!r}" if self.method.type in NEEDS_MODEL else f"keep {self.keep!r}"
            raise ValueError(f"{what} needs a model (--model): its tokenizer defines a token")
        given = [name for name in ("load_in", "attn") if getattr(self, name) is not None]
        if self.model is None and given:
            raise ValueError(f"{' and '.join(given)} say how a model is loaded; give --model, or leave them out")
        return self

    def keep_amount(self) -> tuple[Decimal, str]:
        """Return (amount, unit), the amount exact, with unit in {"share", "rows", "tokens"}; shares lie in (0, 1]."""
        match = _KEEP.match(self.keep)
        assert match is not None  # the validator has seen it
        amount = Decimal(match[1])
        if match[2] == "%":
            return amount / 100, "share"
        return amount, "tokens" if match[2] == "tok" else "rows"
