"""Settings of `tune`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from honeloom.config.base import Attention, Config, LoadIn, ModelInput, NoResultMark, RowsConfig, RowsInput
from honeloom.config.methods import MethodConfig, default_type
from honeloom.registry import suggest

__all__ = [
    "AdamWConfig", "FullConfig", "LoraMethodConfig", "MezoConfig", "MezoTuningConfig", "Optimizer", "SgdConfig",
    "TuneConfig", "TuneMethod",
]  # fmt: skip


def _number_or_auto(value: Any) -> Any:
    """Say in one sentence what a union of a number and a word would say in two."""
    if isinstance(value, str) and value != "auto":
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"must be a number over 0, or auto{suggest(value, ['auto'])}") from None
    if isinstance(value, int | float) and not value > 0:
        raise ValueError("must be over 0, or auto")
    return value


NumberOrAuto = Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], BeforeValidator(_number_or_auto)]


def _as_names(value: Any) -> Any:
    """Let one module's name stand for a list of one."""
    return (value,) if isinstance(value, str) and value != "all-linear" else value


class LoraMethodConfig(MethodConfig):
    """Low-rank adapters; the base stays as it is."""

    type: Literal["lora"] = "lora"
    rank: int = Field(8, gt=0, le=4096)
    alpha: float | None = Field(None, gt=0, description="Scale numerator; default 2 x rank.")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_as_names)] = Field(
        "all-linear", description="Modules that get adapters."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")


class FullConfig(MethodConfig):
    """All weights are trained."""

    type: Literal["full"] = "full"


TuneMethod = Annotated[LoraMethodConfig | FullConfig, Field(discriminator="type"), default_type("lora")]


class AdamWConfig(Config):
    """AdamW with decoupled weight decay."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class SgdConfig(Config):
    """Plain stochastic gradient descent."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)


class MezoConfig(Config):
    """Zeroth-order steps: two forward passes along a random direction, no gradients kept (arXiv:2305.17333)."""

    type: Literal["mezo"] = "mezo"
    mu: float = Field(1e-3, gt=0, description="Distance to both sides, in units of the weights.")
    direction: Literal["gaussian", "rademacher"] = Field(
        "gaussian", description="Normal numbers, as published, or signs, which are drawn twice as fast."
    )
    directions: int = Field(1, ge=1, description="Per step; each costs two forward passes.")
    setting: Literal["memory", "speed"] = Field(
        "memory",
        description="Draw directions again for every pass, or keep them: one more copy of what is trained, and for "
        "adapters both losses from one forward pass of twice the rows.",
    )
    perturb: Literal["all", "b"] = Field("all", description="Of LoRA: both factors, or B alone.")
    clip: float | None = Field(None, gt=0, description="Largest magnitude of a step's scalar.")
    objective: Literal["loss", "accuracy", "exact_match"] = Field(
        "loss",
        description="What is made small: the loss; or the share of target tokens that are not the likeliest; or of "
        "rows with any such token.",
    )


class MezoTuningConfig(MezoConfig):
    """Zeroth-order steps on one machine, where the distance can also be measured before the first one."""

    mu: NumberOrAuto = Field(  # type: ignore[assignment]  # a wider type; "auto" becomes a number before training
        1e-3,
        description="Distance to both sides, in units of the weights; auto: where projected gradients change least.",
    )


Optimizer = Annotated[AdamWConfig | SgdConfig, Field(discriminator="type"), default_type("adamw")]
TuneOptimizer = Annotated[AdamWConfig | SgdConfig | MezoConfig, Field(discriminator="type"), default_type("adamw")]
LocalOptimizer = Annotated[
    AdamWConfig | SgdConfig | MezoTuningConfig, Field(discriminator="type"), default_type("adamw")
]


class TuneConfig(RowsConfig):
    """Tune a model on one machine."""

    model: ModelInput
    rows: RowsInput = Field(min_length=1)
    method: TuneMethod = Field(default_factory=LoraMethodConfig)
    optimizer: LocalOptimizer = Field(default_factory=AdamWConfig)
    lr: NumberOrAuto | None = Field(
        None,
        description="Default 2e-4 for lora, 2e-5 for full; with mezo 1e-4 for lora, 1e-6 for full. With mezo, auto: "
        "from the loss's curvature and batch noise at the start, which forward passes measure.",
    )
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps.")
    max_steps: int | None = Field(None, gt=0, description="Stop after N optimizer steps.")
    epochs: float | None = Field(None, gt=0, description="Passes over the rows; default 1 without max_steps.")
    batch_size: int = Field(8, gt=0, description="Rows per forward pass.")
    accumulate: int = Field(1, gt=0, description="Forward passes per optimizer step.")
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int | None = Field(None, gt=1, description="Tokens per row; default: the model's limit, at most 2048.")
    load_in: LoadIn = None
    attn: Attention = None
    gradient_checkpointing: bool = Field(
        False, description="Keep one activation per layer and compute the rest again: less memory, about 30% slower."
    )
    packing: bool = Field(
        False,
        description="Lay the rows of a batch end to end instead of padding them; "
        "attention stays inside a row, so the result is that of padded rows.",
    )
    group_by_length: bool = Field(False, description="Batch rows of similar length: less padding, another row order.")
    checkpoint_every: int = Field(200, gt=0, description="Optimizer steps between resumable checkpoints.")
    report_to: Annotated[tuple[Literal["trackio", "wandb", "mlflow", "tensorboard"], ...], NoResultMark()] = Field(
        (), description="Trackers that get the loss of every step."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TuneConfig:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give max_steps or epochs, not both")
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> TuneConfig:
        if self.load_in is not None and self.method.type == "full":
            raise ValueError(f"load_in {self.load_in}: quantised weights cannot be trained; use method lora (QLoRA)")
        if self.packing and self.group_by_length:
            raise ValueError("packing leaves no padding, so group_by_length would change nothing; give one of them")
        if isinstance(self.optimizer, MezoConfig):
            self._check_mezo(self.optimizer)
        elif self.lr == "auto":
            raise ValueError("lr auto is for zeroth-order steps: add --optimizer mezo, or give lr as a number")
        return self

    def _check_mezo(self, mezo: MezoConfig) -> None:
        """Refuse what means nothing where there are no gradients."""
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: mezo keeps no activations, so there is nothing to save; leave it out"
            )
        if self.max_grad_norm != type(self).model_fields["max_grad_norm"].default:
            raise ValueError("max_grad_norm: mezo has no gradients; use optimizer.clip, which bounds its scalars")
        if self.report_to:
            raise ValueError("report_to: trackers are told by the trainer, which mezo does not use; leave it out")
        if mezo.perturb == "b" and self.method.type != "lora":
            raise ValueError("optimizer.perturb b is about the factors of LoRA; use method lora")
        if mezo.objective == "exact_match" and self.packing:
            raise ValueError("objective exact_match is about rows, and packing lays them end to end; leave packing out")
        if mezo.objective != "loss" and "auto" in (self.lr, mezo.mu):
            raise ValueError("auto: a share of tokens has no curvature; give lr and mu, or use objective loss")

    @property
    def learning_rate(self) -> float:
        """The rate in force; `auto` has none before it is measured."""
        if self.lr == "auto":
            raise ValueError("lr auto is not measured yet")
        if self.lr is not None:
            return self.lr
        if self.optimizer.type == "mezo":
            return 1e-4 if self.method.type == "lora" else 1e-6
        return 2e-4 if self.method.type == "lora" else 2e-5
