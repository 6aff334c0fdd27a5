"""Settings of `merge`; also reads mergekit's YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from honeloom.config.base import Config, ModelInput, OptionalModelInput, VerbConfig
from honeloom.config.methods import MethodConfig, default_type

__all__ = ["LinearConfig", "MergeConfig", "MergeMethod", "SlerpConfig", "Source", "TaskArithmeticConfig"]


class LinearConfig(MethodConfig):
    """Weighted average of the models."""

    type: Literal["linear"] = "linear"
    normalize: bool = Field(True, description="Divide the weights by their sum.")


class TaskArithmeticConfig(MethodConfig):
    """The base plus a weighted sum of task vectors."""

    type: Literal["task_arithmetic"] = "task_arithmetic"
    scale: float = Field(1.0, description="Multiplier on the summed task vectors (the paper's lambda).")
    normalize: bool = Field(False, description="Divide the weights by their sum.")


class SlerpConfig(MethodConfig):
    """Spherical interpolation of two models."""

    type: Literal["slerp"] = "slerp"
    t: float = Field(0.5, ge=0, le=1, description="0 gives the base (or first) model, 1 the other.")


MergeMethod = Annotated[
    LinearConfig | TaskArithmeticConfig | SlerpConfig, Field(discriminator="type"), default_type("linear")
]


class Source(Config):
    """One model to merge and its weight."""

    model: ModelInput
    weight: float = 1.0


class MergeConfig(VerbConfig):
    """Merge models of one architecture into one."""

    models: tuple[Source, ...] = Field(min_length=1)
    method: MergeMethod = Field(default_factory=LinearConfig)
    base_model: OptionalModelInput = Field(
        None, description="Origin of the task vectors; donor of config and tokenizer."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="Of the output; auto keeps the donor's.")
    allow_nan: bool = Field(False, description="Merge even if an input holds NaN or infinity.")

    @model_validator(mode="before")
    @classmethod
    def _from_mergekit(cls, data: Any) -> Any:
        return translate_mergekit(data) if isinstance(data, dict) and "merge_method" in data else data

    @field_validator("models", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [{"model": v} if isinstance(v, str) else v for v in value]
        return value

    @model_validator(mode="after")
    def _fits(self) -> MergeConfig:
        kind, count = self.method.type, len(self.models)
        if kind == "task_arithmetic" and self.base_model is None:
            raise ValueError("task_arithmetic needs base_model: a task vector is a model minus its base")
        if kind == "slerp":
            others = [s for s in self.models if s.model != self.base_model]
            if len(others) != (2 if self.base_model is None else 1):
                raise ValueError(f"slerp takes exactly two models (base_model included); found {count} under models")
        if isinstance(self.method, LinearConfig) and self.method.normalize and sum(s.weight for s in self.models) == 0:
            raise ValueError("the weights sum to 0; set method.normalize to false or change them")
        return self


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def translate_mergekit(data: dict[str, Any]) -> dict[str, Any]:
    """Translate mergekit's YAML keys into ours; whatever it cannot express is refused by name.

    mergekit's `lambda` of task arithmetic is our `scale`; per-model parameters other than
    `weight`, slices, and scalar gradients are refused.
    """
    rest = dict(data)
    parameters = dict(rest.pop("parameters", None) or {})
    method: dict[str, Any] = {"type": rest.pop("merge_method")}
    if "lambda" in parameters:
        parameters["scale"] = parameters.pop("lambda")
    method.update(parameters)
    models = [_translate_source(entry) for entry in rest.pop("models", None) or []]
    result = {"method": method, "models": models, **rest}
    if method["type"] != "linear":  # mergekit lists the base among the models; it has no task vector
        result["models"] = [m for m in models if m.get("model") != rest.get("base_model")]
    if "dtype" in result:
        result["dtype"] = _DTYPES.get(result["dtype"], result["dtype"])
    return result


def _translate_source(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        return {"model": entry}
    flat = {k: v for k, v in entry.items() if k != "parameters"}
    return {**flat, **(entry.get("parameters") or {})}
