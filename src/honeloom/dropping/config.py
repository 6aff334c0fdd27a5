"""Settings of `drop`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    StrictBool,
    StrictInt,
    WithJsonSchema,
    model_validator,
)

from honeloom.config.base import Attention, Config, ModelInput, OptionalFileInput, RowsConfig, RowsInput
from honeloom.config.methods import FamilyMethod
from honeloom.dropping.budget import BUDGETS, Budget, parse_budget, read_budgets
from honeloom.dropping.metric_config import CosineConfig, DropMetricConfig
from honeloom.dropping.scores import KINDS, Kind

__all__ = ["DropConfig", "DropMetric", "LayersConfig", "Profile"]


DropMetric = Annotated[SerializeAsAny[DropMetricConfig], FamilyMethod("dropping", "cosine")]
Profile = Literal["zero", "native", "dropped", "decilm", "gguf"]
_Layers = tuple[StrictBool, ...] | tuple[StrictInt, ...]
_BUDGET_SCHEMA = {
    "anyOf": [
        {"type": "object", "propertyNames": {"enum": list(BUDGETS)}},
        {"type": "array", "items": {"type": "string"}},
        {"type": "string"},
    ]
}
_CHOOSING = (
    "attention", "mlp", "block", "joint", "budget", "choice", "per_round", "kinds", "consecutive", "native", "alpha",
    "protect_first", "protect_last", "max_run", "scores",
)  # fmt: skip
"""Settings of the choice, which named layers leave nothing of."""
_HEALING = ("heal_steps", "heal_rank", "heal_lr", "heal_batch_size")


class LayersConfig(Config):
    """Layers that are named instead of chosen: their numbers from 0, or one true or false per layer."""

    attention: _Layers = ()
    mlp: _Layers = ()
    block: _Layers = ()
    from_end: bool = Field(False, description="Numbers below 0 count from the last layer: -1 is the last.")


class DropConfig(RowsConfig):
    """Drop attention, MLP or whole blocks."""

    model: ModelInput
    attention: int = Field(0, ge=0, description="How many attentions to drop.")
    mlp: int = Field(0, ge=0, description="How many MLPs to drop.")
    block: int = Field(0, ge=0, description="How many whole blocks to drop.")
    joint: int = Field(0, ge=0, description="How many attentions and MLPs to drop, by one ranking of both.")
    budget: Annotated[dict[str, str], BeforeValidator(read_budgets), WithJsonSchema(_BUDGET_SCHEMA)] = Field(
        default_factory=dict,
        description="Limits that the result must keep, absolute or in percent of the source: kv_bytes_per_token, "
        "params, flops, loss_increase (nats per token of the calibration rows).",
    )
    layers: LayersConfig | None = Field(None, description="Drop these layers; nothing is scored.")
    calibration: RowsInput = Field((), description="Rows on which importance is measured.")
    metric: DropMetric = Field(default_factory=CosineConfig)
    scores: OptionalFileInput = Field(
        None, description="scores.json of an earlier drop, taken for the importances instead of measuring."
    )
    choice: Literal["one_shot", "iterative", "greedy"] = Field(
        "one_shot",
        description="one_shot: by one scoring of the whole model. iterative: score again after every round. greedy: "
        "drop what raises the measured loss least, one at a time.",
    )
    per_round: int = Field(1, gt=0, description="Units that a round of the iterative choice drops.")
    kinds: tuple[Kind, ...] = Field(("attention", "mlp"), min_length=1, description="What a budget may drop.")
    consecutive: bool = Field(False, description="Drop blocks as one run of neighbours.")
    native: bool = Field(
        False,
        description="Choose halves that leave whole blocks: the MLP of a layer goes with the next attention, or with "
        "its own. Profile native implies it.",
    )
    alpha: float = Field(
        1.0, gt=0, description="Factor of attention's importances beside those of MLPs, in joint choices and budgets."
    )
    protect_first: int = Field(0, ge=0, description="Keep this many layers at the start whole.")
    protect_last: int = Field(0, ge=0, description="Keep this many layers at the end whole.")
    max_run: int | None = Field(None, gt=0, description="Most neighbouring layers that may lack the same half.")
    profile: Profile = Field(
        "zero",
        description="zero: output projections become 0; loads anywhere, saves nothing. native: a stock model of fewer "
        "layers. dropped: the source without what is dropped. decilm: for vLLM and TensorRT-LLM. gguf: for llama.cpp.",
    )
    heal: RowsInput = Field((), description="Rows on which the dropped model is tuned with LoRA before it is written.")
    heal_steps: int = Field(200, gt=0, description="Optimizer steps of healing.")
    heal_rank: int = Field(16, gt=0, le=4096, description="Rank of healing's adapters.")
    heal_lr: float = Field(2e-4, gt=0, description="Learning rate of healing.")
    heal_batch_size: int = Field(8, gt=0, description="Rows per step of healing.")
    affine: bool = Field(
        False,
        description="Scale the channels of the half behind every gap, by least squares on the calibration rows, so "
        "that the stream is closest to the source's.",
    )
    only: Literal["scores"] | None = Field(None, description="scores: measure importances and drop nothing.")
    measure: int = Field(
        32, ge=0, description="Calibration rows on which the loss is measured along the order of drops; 0: not at all."
    )
    speed_context: int | None = Field(
        None, gt=0, description="Time decoding with this many tokens in the cache, along the order of drops."
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="NaN or infinite numbers in scoring: stop, or leave out the rows that have them."
    )
    attn: Attention = None
    samples: int = Field(256, gt=0, description="At most this many calibration rows.")
    batch_size: int = Field(8, gt=0, description="Rows per forward pass.")
    max_length: int | None = Field(None, gt=1, description="Tokens per row; default: the model's limit, at most 2048.")

    @property
    def counts(self) -> dict[str, int]:
        """How many units of each kind are asked for."""
        return {"block": self.block, "attention": self.attention, "mlp": self.mlp, "joint": self.joint}

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The limits, read."""
        return tuple(parse_budget(key, value) for key, value in self.budget.items())

    @property
    def pairs(self) -> bool:
        """Whether halves must leave whole blocks."""
        return self.native or self.profile == "native"

    @model_validator(mode="after")
    def _drops_something(self) -> DropConfig:
        wanted = any(self.counts.values()) or bool(self.budget) or self.layers is not None
        if self.only == "scores":
            idle = [n for n in ("layers", "heal", "affine", "speed_context", *_CHOOSING) if self._is_given(n)]
            if idle:
                raise ValueError(f"only scores: nothing is dropped, so {idle[0]} would change nothing; leave it out")
        if not self.calibration and self.layers is None and self.scores is None:
            raise ValueError("missing key 'calibration' (Rows on which importance is measured)")
        if not wanted and self.only is None:
            raise ValueError(
                "nothing to drop: give attention, mlp, block or joint a number above 0, a budget, or layers; only "
                "scores measures and drops nothing"
            )
        return self

    @model_validator(mode="after")
    def _no_idle_setting(self) -> DropConfig:
        """Refuse settings that would change nothing."""
        if self.layers is not None:
            idle = [name for name in _CHOOSING if self._is_given(name)]
            if idle:
                raise ValueError(f"layers names what goes, so {idle[0]} would change nothing; give one of the two")
        needs = {
            "per_round": (self.choice == "iterative", "choice iterative"),
            "kinds": (bool(self.budget), "a budget"),
            "consecutive": (self.block > 0, "block"),
            "alpha": (self.joint > 0 or bool(self.budget), "joint or a budget"),
            **{name: (bool(self.heal), "heal") for name in _HEALING},
        }
        for name, (there, what) in needs.items():
            if self._is_given(name) and not there:
                raise ValueError(f"{name} would change nothing without {what}; give that too, or leave {name} out")
        return self

    @model_validator(mode="after")
    def _can_be_chosen(self) -> DropConfig:
        """Refuse choices that no scores could make."""
        measured = [n for n, on in (("choice greedy", self.choice == "greedy"), ("affine", self.affine),
                    ("budget loss_increase", "loss_increase" in self.budget)) if on]  # fmt: skip
        if measured and not (self.calibration and self.measure):
            raise ValueError(f"{measured[0]} measures the model: give calibration rows, and measure above 0")
        if self.scores is not None and self.choice != "one_shot":
            raise ValueError(f"scores are of the whole model, and choice {self.choice} measures anew; leave one out")
        wanted = self._kinds_wanted()
        missing = [kind for kind in KINDS if kind in wanted and kind not in self.metric.kinds]
        if missing and self.choice != "greedy":
            raise ValueError(
                f"metric {self.metric.type} scores {', '.join(self.metric.kinds)} alone, and {missing[0]} is to be "
                "ranked; choose another metric"
            )
        if self.consecutive and (self.choice != "one_shot" or self.scores is not None or self.max_run is not None):
            raise ValueError("consecutive scores one run of blocks; leave choice, scores and max_run out")
        self._check_pairs()
        return self

    def _kinds_wanted(self) -> set[str]:
        counts = self.counts
        wanted = {kind for kind in KINDS if counts[kind]}
        if counts["joint"]:
            wanted |= {"attention", "mlp"}
        return wanted | (set(self.kinds) if self.budget else set())

    def _check_pairs(self) -> None:
        what = "profile native" if self.profile == "native" else "native"
        if not self.pairs or self.layers is not None:
            return
        if self.attention != self.mlp:
            raise ValueError(
                f"{what}: an attention goes with an MLP, so that whole blocks are left; attention is {self.attention} "
                f"and mlp {self.mlp}: give both the same number, or joint, or block"
            )
        if self.joint % 2:
            raise ValueError(f"{what}: halves go in pairs, so that whole blocks are left; joint {self.joint} is odd")
        if self.budget and "block" not in self.kinds and set(self.kinds) != {"attention", "mlp"}:
            raise ValueError(f"{what}: halves go in pairs; kinds must hold attention and mlp, or block")
        if self.choice == "iterative" and (self.attention or self.joint or self.mlp) and self.per_round % 2:
            raise ValueError(f"{what}: halves go in pairs, so per_round must be even (it is {self.per_round})")

    def _is_given(self, name: str) -> bool:
        """Whether a setting is not what it is by default."""
        default: Any = type(self).model_fields[name].get_default(call_default_factory=True)
        return bool(getattr(self, name) != default)
