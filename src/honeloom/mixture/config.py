"""Settings of `mix`; also reads mergekit-moe's YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from honeloom.config.base import Config, ModelInput, NoResultMark, OptionalModelInput, RowsInput, VerbConfig, Withdrawn
from honeloom.config.methods import FamilyMethod, MethodConfig
from honeloom.config.sizes import size_in_bytes
from honeloom.mixture.mergekit_moe import is_mergekit_moe, translate
from honeloom.mixture.routers import PromptsRouterConfig, RouterConfig, RowsRouterConfig

__all__ = ["Expert", "MixConfig", "RouterMethod", "TuneRouter"]

RouterMethod = Annotated[SerializeAsAny[MethodConfig], FamilyMethod("routing", "prompts")]
_NAME = re.compile(r"\w[\w.-]*")


class Expert(Config):
    """One expert, and what its router knows of it."""

    model: ModelInput
    name: str | None = Field(None, description="In reports and folders; default: the last part of the model's path.")
    prompts: tuple[str, ...] = Field((), description="Texts that it shall answer.")
    negative_prompts: tuple[str, ...] = Field((), description="Texts that it shall not answer.")
    rows: RowsInput = Field((), description="Rows of its domain.")

    @field_validator("name")
    @classmethod
    def _can_be_a_folder(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("an expert's name has letters, digits, '_', '.' and '-' only")
        return value


class TuneRouter(Config):
    """Training of the gates alone, after the mixture is made."""

    steps: int = Field(0, ge=0, description="Optimizer steps; 0 trains nothing.")
    rows: RowsInput = Field((), description="What is trained on.")
    lr: float = Field(1e-3, gt=0, description="Learning rate of AdamW, constant.")
    batch_size: int = Field(8, ge=1, description="Rows per step.")
    max_length: int = Field(512, ge=2, description="Tokens per row at most.")


class MixConfig(VerbConfig):
    """Mix trained models into one mixture of experts."""

    level: Literal["ffn", "block", "model"] = Field(
        "ffn", description="What an expert is: the MLP of a layer, a whole layer, or the stack of layers."
    )
    experts: tuple[Expert, ...] = Field(min_length=1, description="The models; a name alone stands for {model: NAME}.")
    base_model: OptionalModelInput = Field(
        None, description="Gives embeddings, attention, norms, head and dense layers; default: the first expert."
    )
    shared_expert: OptionalModelInput = Field(
        None, description="A model whose MLP is added for every token, beside the chosen ones; level ffn."
    )
    router: RouterMethod = Field(default_factory=PromptsRouterConfig)
    router_input: Literal["auto", "token", "sample"] = Field(
        "auto", description="Who is routed: every token (level ffn), or a whole sample by its prompt."
    )
    gate: Literal["linear", "mlp"] = Field("linear", description="mlp has a hidden layer; it needs tune_router.")
    gate_width: int | None = Field(
        None, ge=1, description="Hidden units of an mlp gate; default: 64, or two per expert."
    )
    top_k: int | None = Field(None, ge=1, description="Experts at a time; default: 2 of level ffn, else 1.")
    dense_layers: int = Field(0, ge=0, description="The first N layers stay the base model's (a hybrid).")
    encoder: OptionalModelInput = Field(
        None, description="Level model without dense layers: reads the prompt; default: base_model, else expert 0."
    )
    encoder_layer: int | None = Field(
        None, ge=-1, description="Layer whose output the router reads, -1 the embeddings; default: the middle one."
    )
    tune_router: TuneRouter = Field(default_factory=TuneRouter)
    format: Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe", "honeloom"] = Field(
        "auto", description="auto: the standard folder that can hold it, else honeloom's own."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="Of the output; auto keeps the base's.")
    source_format: Annotated[Literal["honeloom", "mergekit"], NoResultMark()] = Field(
        "honeloom", description="In whose words the file was written; only messages depend on it."
    )
    withdraw: Withdrawn = ()
    max_memory: Annotated[int | None, BeforeValidator(size_in_bytes), NoResultMark()] = Field(
        None, gt=0, description="Bytes of memory at most, for example 2GiB."
    )
    threads: Annotated[int | None, NoResultMark()] = Field(None, ge=1, description="Threads; default: one per core.")

    @model_validator(mode="before")
    @classmethod
    def _from_mergekit(cls, data: Any) -> Any:
        return translate(data) if isinstance(data, dict) and is_mergekit_moe(data) else data

    @field_validator("experts", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [v if isinstance(v, dict | Expert) else {"model": v} for v in value]
        return value

    @model_validator(mode="after")
    def _fits(self) -> MixConfig:
        _check_level(self)
        _check_sizes(self)
        _check_gate(self)
        if isinstance(self.router, RouterConfig):
            _check_router(self, self.router)
        return self

    @property
    def input(self) -> Literal["token", "sample"]:
        """Who is routed."""
        if self.router_input == "auto":
            return "token" if self.level == "ffn" else "sample"
        return self.router_input

    @property
    def chosen(self) -> int:
        """Experts at a time."""
        return self.top_k or min(2 if self.level == "ffn" else 1, len(self.experts))

    @property
    def width(self) -> int:
        """Hidden units of an mlp gate."""
        return self.gate_width or max(64, 2 * len(self.experts))

    @property
    def whole_models(self) -> bool:
        """Whether experts are models side by side, which share nothing."""
        return self.level == "model" and self.dense_layers == 0

    @property
    def names(self) -> tuple[str, ...]:
        """One name per expert, all different."""
        return _unique(e.name or _last_part(e.model) for e in self.experts)


def _last_part(model: str) -> str:
    """The end of a path, hub id or base+adapter, as a name."""
    last = PurePath(model.rpartition("+")[2].partition("@")[0].rstrip("/\\")).name or model
    return re.sub(r"[^\w.-]+", "-", last).lstrip(".-") or "expert"


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """Add -2, -3, ... to names that were there before."""
    taken: dict[str, None] = {}
    for name in names:
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}-{number}"
        taken[free] = None
    return tuple(taken)


def _check_level(config: MixConfig) -> None:
    if config.level != "ffn" and config.router_input == "token":
        raise ValueError(
            f"router_input token: a {config.level} is chosen for a whole sample, for its attention needs the keys of "
            "all tokens before; leave it out, or take level: ffn"
        )
    if config.level != "ffn" and config.shared_expert is not None:
        raise ValueError(f"shared_expert: an MLP beside the chosen ones exists at level ffn alone, not {config.level}")
    if not config.whole_models:
        for name in ("encoder", "encoder_layer"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}: only level model with dense_layers 0 has an encoder; other gates read the base's layers"
                )
    names = [e.name for e in config.experts if e.name is not None]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"two experts have the name {twice!r}")


def _check_sizes(config: MixConfig) -> None:
    count = len(config.experts)
    if config.top_k is not None and config.top_k > count:
        raise ValueError(f"top_k {config.top_k}: there are {count} experts")
    if config.level == "model" and config.chosen > 1:
        raise ValueError(f"top_k {config.top_k}: level model takes one decision for one model; its top_k is 1")
    standard = config.format in ("mixtral", "qwen2_moe", "qwen3_moe")
    if standard and (config.level != "ffn" or config.input != "token"):
        raise ValueError(
            f"format {config.format}: it routes every token to MLPs (level ffn, router_input token); here it is level "
            f"{config.level}, router_input {config.input}. Take format: auto or honeloom"
        )
    if config.format in ("mixtral", "qwen3_moe") and config.shared_expert is not None:
        raise ValueError(f"format {config.format}: it has no shared expert; take format: auto or qwen2_moe")


def _check_gate(config: MixConfig) -> None:
    tune = config.tune_router
    if config.gate == "mlp":
        if not tune.steps:
            raise ValueError(
                "gate mlp: no router gives a hidden layer without training, so it would compute what a linear gate "
                "does; set tune_router.steps, or gate: linear"
            )
        if config.format not in ("auto", "honeloom"):
            raise ValueError(f"gate mlp: format {config.format} has linear gates alone; take format: auto or honeloom")
        if config.width < 2 * len(config.experts):
            raise ValueError(
                f"gate_width {config.gate_width}: must be at least {2 * len(config.experts)}, twice the number of "
                "experts"
            )
    elif config.gate_width is not None:
        raise ValueError("gate_width: a linear gate has no hidden layer; leave it out, or take gate: mlp")
    if bool(tune.steps) != bool(tune.rows):
        raise ValueError("tune_router: steps and rows go together; give both, or none")


def _check_router(config: MixConfig, router: RouterConfig) -> None:
    kind, needs = router.type, router.data
    if router.kind == "subspace":
        if config.level != "ffn":
            raise ValueError(
                f"router {kind}: it measures the input of the matrices that it was made from, which a gate sees at "
                f"level ffn alone; at level {config.level} take another router"
            )
        if config.format not in ("auto", "honeloom"):
            raise ValueError(
                f"router {kind}: format {config.format} has linear gates alone; take format: auto or honeloom"
            )
        if config.gate == "mlp":
            raise ValueError(f"router {kind}: its gate is a subspace, no mlp; leave gate out")
    if needs == "changes" and config.base_model is None:
        raise ValueError(f"router {kind} needs base_model: a task vector is an expert minus its base")
    if isinstance(router, PromptsRouterConfig) and router.pooling == "last" and config.input == "sample":
        raise ValueError("router.pooling last: the gate of a sample sees the mean of the prompt; leave it out")
    own = isinstance(router, RowsRouterConfig) and not router.rows
    _check_experts(config, kind, prompts=needs == "prompts", rows=own)


def _check_experts(config: MixConfig, kind: str, *, prompts: bool, rows: bool) -> None:
    """Every expert has what the router is made from, and nothing that it would not look at."""
    for i, expert in enumerate(config.experts):
        wanted = {"prompts": prompts, "rows": rows}
        for name, want in wanted.items():
            if want and not getattr(expert, name):
                raise ValueError(
                    f"experts.{i}.{name}: router {kind} needs some of every expert; give them, or take router: random"
                )
            if not want and getattr(expert, name):
                raise ValueError(f"experts.{i}.{name}: router {kind} does not look at them; leave them out")
        if not prompts and expert.negative_prompts:
            raise ValueError(f"experts.{i}.negative_prompts: router {kind} does not look at them; leave them out")
