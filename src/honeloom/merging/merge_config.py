"""Settings of `merge`; also reads mergekit's YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from honeloom.config.base import Config, ModelInput, NoResultMark, OptionalModelInput, RowsInput, VerbConfig, Withdrawn
from honeloom.config.methods import FamilyMethod, MethodConfig
from honeloom.config.sizes import size_in_bytes
from honeloom.merging.config import LinearConfig, MergeMethodConfig
from honeloom.merging.mergekit import is_mergekit, translate
from honeloom.merging.parameters import Bounded, Varying, numbers, varies, varying_fields

__all__ = [
    "ACCEPTABLE", "MergeConfig", "MergeMethod", "Slice", "Source", "TokenRule", "TokenizerConfig",
]  # fmt: skip

MergeMethod = Annotated[SerializeAsAny[MethodConfig], FamilyMethod("merging", "linear")]
ACCEPTABLE = (
    "rms_norm_eps", "hidden_act", "rope_parameters", "sliding_window", "layer_types", "attn_logit_softcapping",
    "final_logit_softcapping", "query_pre_attn_scalar", "num_experts_per_tok", "norm_topk_prob",
)  # fmt: skip
"""Fields that change the arithmetic around the weights and not their shapes: a user may let them differ."""
_PER_MODEL = ("density", "gamma", "epsilon", "scale")


class Source(Config):
    """One model to merge, its weight, and settings of the method for it alone."""

    model: ModelInput
    weight: Annotated[Varying, Bounded()] = 1.0
    density: Annotated[Varying | None, Bounded(gt=0, le=1)] = Field(None, description="Instead of the method's.")
    gamma: Annotated[Varying | None, Bounded(ge=0, le=1)] = Field(None, description="Instead of the method's.")
    epsilon: Annotated[Varying | None, Bounded(ge=0, le=1)] = Field(None, description="Instead of the method's.")
    scale: Annotated[Varying | None, Bounded()] = Field(None, description="Instead of the method's.")
    rows: RowsInput = Field((), description="Rows of this model's domain, for methods that measure on data.")

    def own(self) -> dict[str, Any]:
        """Settings of the method that it has for itself."""
        return {name: value for name in _PER_MODEL if (value := getattr(self, name)) is not None}


class SliceSource(Source):
    """Layers of one model."""

    layer_range: tuple[int, int] = Field(description="First layer, and the one after the last.")

    @field_validator("layer_range")
    @classmethod
    def _forward(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"layer_range {list(value)}: must be [first, end) with 0 <= first < end")
        return value


class Slice(Config):
    """Some layers of the result: the same number of layers of each source."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    parameters: dict[str, Varying] = Field({}, description="Settings of the method for these layers alone.")

    @model_validator(mode="after")
    def _equally_long(self) -> Slice:
        lengths = {s.layer_range[1] - s.layer_range[0] for s in self.sources}
        if len(lengths) > 1:
            raise ValueError(f"its sources have {sorted(lengths)} layers; all sources of a slice need the same number")
        return self


class TokenRule(Config):
    """Where the embedding of a token comes from."""

    source: str = Field(description="A model; `zero`; or model#id or model#token for another row.")
    force: bool = Field(False, description="Take this row for every model, even one that has the token.")


class TokenizerConfig(Config):
    """The vocabulary of the result."""

    source: str = Field("base", description="base (the donor's), union, or one of the models.")
    tokens: dict[str, TokenRule] = Field({}, description="Tokens whose embeddings have a source of their own.")
    pad_to_multiple_of: int | None = Field(None, gt=0, description="Rows of the embeddings are filled up to it.")


def _tokenizer_name(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class MergeConfig(VerbConfig):
    """Merge models of one architecture into one."""

    models: tuple[Source, ...] = Field((), description="What is merged, whole models.")
    slices: tuple[Slice, ...] = Field((), description="Instead of models: the layers of the result, from layer ranges.")
    method: MergeMethod = Field(default_factory=LinearConfig)
    base_model: OptionalModelInput = Field(
        None, description="Origin of the task vectors; donor of config and tokenizer."
    )
    tokenizer: Annotated[TokenizerConfig | None, BeforeValidator(_tokenizer_name)] = Field(
        None, description="Merge by tokens instead of by rows; needed where vocabularies differ."
    )
    chat_template: str | None = Field(
        None,
        description="auto (that of the tokenizer's giver), a model listed here, chatml, llama3, alpaca, or a Jinja "
        "template; must be given where the models' differ.",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="Of the output; auto keeps the donor's.")
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="How results become the output type; stochastic keeps small changes on average."
    )
    compat: Literal["none", "mergekit"] = Field(
        "none", description="mergekit: its behaviour where it is not the paper's."
    )
    source_format: Annotated[Literal["honeloom", "mergekit"], NoResultMark()] = Field(
        "honeloom", description="In whose words the file was written; only messages depend on it."
    )
    accept: tuple[str, ...] = Field(
        (), description="Fields of the configurations that may differ (rope_parameters, ...)."
    )
    allow_nan: bool = Field(False, description="Merge even if an input holds NaN or infinity.")
    withdraw: Withdrawn = ()
    max_memory: Annotated[int | None, BeforeValidator(size_in_bytes), NoResultMark()] = Field(
        None, gt=0, description="Bytes of memory at most, for example 2GiB."
    )
    threads: Annotated[int | None, NoResultMark()] = Field(None, ge=1, description="Threads; default: one per core.")

    @model_validator(mode="before")
    @classmethod
    def _from_mergekit(cls, data: Any) -> Any:
        return translate(data) if isinstance(data, dict) and is_mergekit(data) else data

    @field_validator("models", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [{"model": v} if isinstance(v, str) else v for v in value]
        return value

    @model_validator(mode="after")
    def _fits(self) -> MergeConfig:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give models, or slices; one of the two must not be empty")
        if isinstance(self.method, MergeMethodConfig):
            _check_method(self, self.method)
        unknown = sorted(set(self.accept) - set(ACCEPTABLE))
        if unknown:
            raise ValueError(f"accept: {unknown[0]!r} cannot differ between models; {', '.join(ACCEPTABLE)} can")
        return self

    def parts(self) -> Iterator[tuple[str, tuple[Source, ...]]]:
        """Places and sources of what is merged together: all models, or slice by slice."""
        if self.models:
            yield "models", self.models
        for i, part in enumerate(self.slices):
            yield f"slices.{i}.sources", part.sources

    def sources(self) -> Iterator[tuple[str, Source]]:
        """Every source and its place."""
        for place, sources in self.parts():
            for i, source in enumerate(sources):
                yield f"{place}.{i}", source


def _check_method(config: MergeConfig, method: MergeMethodConfig) -> None:
    """Refuse what the method cannot do, or would not look at."""
    kind = method.type
    if method.base == "needed" and config.base_model is None:
        raise ValueError(f"{kind} needs base_model: a task vector is a model minus its base")
    for place, sources in config.parts():
        others = [s for s in sources if s.model != config.base_model]
        counted = sources if method.base == "unused" else others
        found = len(counted) + (1 if method.base == "start" and config.base_model else 0)
        least, most = method.counts
        if found < least or (most is not None and found > most):
            wanted = (
                f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            )
            besides = " besides base_model" if method.base == "needed" else ""
            raise ValueError(f"{kind} takes {wanted} model{'s' * (least > 1)}{besides}; found {found} under {place}")
        fixed = not any(varies(s.weight) for s in sources)
        averages = isinstance(method, LinearConfig) and method.normalize
        if averages and fixed and sum(next(iter(numbers(s.weight))) for s in sources) == 0:
            raise ValueError("the weights sum to 0; set method.normalize to false or change them")
    _check_sources(config, method)


def _check_sources(config: MergeConfig, method: MergeMethodConfig) -> None:
    for place, source in config.sources():
        unknown = sorted(source.own().keys() - method.per_model)
        if unknown:
            known = f"it takes {', '.join(sorted(method.per_model))}" if method.per_model else "it takes none"
            raise ValueError(f"{place}.{unknown[0]}: {method.type} has no such setting for one model; {known}")
        if not method.weighted and source.weight != 1.0:
            raise ValueError(f"{place}.weight: {method.type} does not look at weights; leave it out")
        if bool(source.rows) != bool(method.data):
            raise ValueError(
                f"{place}.rows: {method.type} measures each model on rows of its own domain; name them"
                if method.data
                else f"{place}.rows: {method.type} measures nothing on rows; leave them out"
            )
    for i, part in enumerate(config.slices):
        _check_parameters(f"slices.{i}.parameters", part.parameters, method)


def _check_parameters(place: str, parameters: Mapping[str, Any], method: MergeMethodConfig) -> None:
    """Settings for some layers alone obey the bounds of the method's own."""
    fields = varying_fields(type(method))
    unknown = sorted(parameters.keys() - fields)
    if unknown:
        known = ", ".join(sorted(fields)) or "none"
        raise ValueError(
            f"{place}: {method.type} has no setting {unknown[0]!r} that may vary by layer (known: {known})"
        )
    given = {name: getattr(method, name) for name in type(method).model_fields}
    try:
        type(method).model_validate({**given, **parameters})
    except ValidationError as error:
        problem = error.errors()[0]
        told = problem.get("ctx", {}).get("error", problem["msg"])
        raise ValueError(f"{place}.{problem['loc'][0]}: {told}") from None
