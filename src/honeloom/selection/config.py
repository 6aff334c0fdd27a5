"""Settings of `select` and of each selection method."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializeAsAny,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from honeloom.config.base import (
    Attention,
    Config,
    EncoderInput,
    FileInput,
    LoadIn,
    NoResultMark,
    OptionalFileInput,
    OptionalModelInput,
    OptionalScoresInput,
    RowsConfig,
    RowsInput,
    ScoresInput,
    validate,
)
from honeloom.config.methods import FamilyMethod, MethodConfig, default_type
from honeloom.errors import ConfigError
from honeloom.registry import family, suggest

__all__ = [
    "DqConfig",
    "DsirConfig",
    "Embedding",
    "FileEmbedding",
    "HiddenEmbedding",
    "IfdConfig",
    "InRunConfig",
    "KCenterConfig",
    "LengthConfig",
    "LessConfig",
    "PerplexityConfig",
    "RandomConfig",
    "ScoresConfig",
    "SelectConfig",
    "SelectMethod",
    "SentenceEmbedding",
    "ShedConfig",
    "StratifiedConfig",
    "TfidfEmbedding",
    "TracinConfig",
    "UtilityConfig",
]

MODEL = frozenset({"model"})
TARGET = frozenset({"target"})
BUDGET = frozenset({"budget"})


Estimator = str | dict[str, str | int | float | bool]


class HiddenEmbedding(Config):
    """Mean of the model's own hidden states over the tokens of a row: nothing to download."""

    type: Literal["hidden"] = "hidden"
    depth: float = Field(0.5, ge=0, le=1, description="0 is the input embedding, 1 the last layer's output.")


class TfidfEmbedding(Config):
    """Words weighted by their rarity, reduced by a truncated SVD: needs no model."""

    type: Literal["tfidf"] = "tfidf"
    size: int = Field(128, ge=2, le=1024, description="Length of a vector.")


class SentenceEmbedding(Config):
    """An encoder of the package sentence-transformers (extra `embed`)."""

    type: Literal["sentence_transformers"] = "sentence_transformers"
    encoder: EncoderInput = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="Hub id or folder; rows are cut at the encoder's limit."
    )


class FileEmbedding(Config):
    """Vectors made elsewhere: a .npy file, one row of numbers per usable row, in reading order."""

    type: Literal["file"] = "file"
    path: FileInput = Field(description="Array (N, d) of floats; it is read in pieces.")


Embedding = Annotated[
    HiddenEmbedding | TfidfEmbedding | SentenceEmbedding | FileEmbedding,
    Field(discriminator="type", description="What makes rows comparable."),
    default_type("hidden"),
]


class UtilityConfig(Config):
    """What a set of rows is worth: tune LoRA adapters on it for a fixed number of steps, score the target."""

    steps: int | None = Field(
        None, ge=1, description="Optimizer steps; default: one pass over all players' rows, at least 8."
    )
    batch_size: int = Field(8, ge=1, description="Rows per step.")
    lr: float = Field(3e-4, gt=0, description="Learning rate of AdamW, falling linearly to zero.")
    rank: int = Field(8, ge=1, description="Of the LoRA adapters, on every linear layer.")
    score: Literal["loss", "accuracy"] = Field(
        "loss", description="Negative loss per token of the target, or accuracy of its multiple-choice rows."
    )
    target_rows: int = Field(128, ge=1, description="Rows of the target that are scored, drawn by the seed.")


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

    def needs(self) -> frozenset[str]:
        """The model whose tokenizer defines a token."""
        return MODEL


class PerplexityConfig(MethodConfig):
    """A band of the model's perplexity of the response."""

    type: Literal["perplexity"] = "perplexity"
    band: Literal["low", "middle", "high"] = Field(
        "middle", description="Which part of the distribution is kept; the middle avoids the trivial and the broken."
    )

    def needs(self) -> frozenset[str]:
        """The model whose losses count."""
        return MODEL


class IfdConfig(MethodConfig):
    """The highest instruction-following difficulty below 1."""

    type: Literal["ifd"] = "ifd"

    def needs(self) -> frozenset[str]:
        """The model whose losses count."""
        return MODEL


class DsirConfig(MethodConfig):
    """Importance resampling on hashed n-grams."""

    type: Literal["dsir"] = "dsir"
    buckets: int = Field(10_000, ge=2, description="Hash buckets of words and pairs of words.")
    noise: bool = Field(True, description="Resample (Gumbel noise on the weights) rather than take the largest.")

    def needs(self) -> frozenset[str]:
        """The target."""
        return TARGET


class KCenterConfig(MethodConfig):
    """Greedy k-center: rows that leave no row far from a chosen one."""

    type: Literal["k_center"] = "k_center"
    embedding: Embedding = Field(default_factory=HiddenEmbedding)

    def needs(self) -> frozenset[str]:
        """What the embedding needs."""
        return needs_of(self.embedding)


class DqConfig(MethodConfig):
    """Dataset quantization: bins filled by greedy graph cut, each sampled evenly."""

    type: Literal["dq"] = "dq"
    bins: int = Field(10, ge=1, description="Non-overlapping bins.")
    embedding: Embedding = Field(default_factory=HiddenEmbedding)

    def needs(self) -> frozenset[str]:
        """What the embedding needs."""
        return needs_of(self.embedding)


class _GradientConfig(MethodConfig):
    """Gradients of rows and of the target along a tuning on the rows."""

    batch_size: int = Field(16, ge=1, description="Rows per step of that tuning.")
    lr: float = Field(2e-4, gt=0, description="Its learning rate.")
    rank: int = Field(8, ge=1, description="Of its LoRA adapters, on every linear layer.")
    target_rows: int = Field(128, ge=1, description="Rows of the target, drawn by the seed.")

    def needs(self) -> frozenset[str]:
        """The model and the target."""
        return MODEL | TARGET

    def tunes(self) -> tuple[int, int]:
        """As set."""
        return self.rank, self.batch_size


class InRunConfig(_GradientConfig):
    """First-order in-run Shapley: what every step of one tuning owes to every row."""

    type: Literal["in_run"] = "in_run"
    epochs: int = Field(1, ge=1, description="Passes over the rows; whole ones, for every row counts as often.")


class _WarmedConfig(_GradientConfig):
    """Gradients at checkpoints along a short warm-up on the rows."""

    checkpoints: int = Field(4, ge=1, description="Passes of the warm-up; gradients are taken after each, or the last.")
    warmup: float = Field(0.05, gt=0, le=1, description="Share of the rows the warm-up tunes on.")


class LessConfig(_WarmedConfig):
    """LESS: the cosine between the Adam step a row would cause and the target's gradient."""

    type: Literal["less"] = "less"
    size: int = Field(8192, ge=16, description="Numbers that a projected gradient keeps.")
    mode: Literal["standard", "less-paper"] = Field(
        "standard",
        description="Mean cosine with the target's rows at the end of the warm-up; or, as in the paper, the sum over"
        " checkpoints, the largest of the target's domains.",
    )


class TracinConfig(_WarmedConfig):
    """TracIn: the inner product of a row's gradient and the target's."""

    type: Literal["tracin"] = "tracin"


class ShedConfig(MethodConfig):
    """SHED: Shapley values of clusters, from tunings on the rows that stand for them."""

    type: Literal["shed"] = "shed"
    mode: Literal["standard", "shed-paper", "shed-release"] = Field(
        "standard",
        description="The others compute what the paper, or its released code, does; for comparison only.",
    )
    by: Literal["embedding", "source", "domain"] = Field(
        "embedding", description="What a cluster is: rows near each other, or rows of one label."
    )
    players: int | None = Field(
        None, ge=2, description="Clusters; default: a third of the budget, at most 3000, at least 8 rows each."
    )
    proxies: int | None = Field(
        None,
        ge=1,
        description="Rows that stand for a cluster, nearest to its centroid; default 1, of a label 32.",
    )
    embedding: Embedding = Field(default_factory=HiddenEmbedding)
    estimator: Estimator = Field("auto", description="Valuation method; see `honeloom methods valuation`.")
    surrogate: Literal["in_run", "none"] | None = Field(
        None,
        description="Cheap values that the evaluations correct: first-order in-run Shapley of the proxies; default: "
        "where the estimator takes them.",
    )
    stability: float | None = Field(
        None, gt=0, lt=1, description="Stop before the budget once this share of the best clusters is expected to stay."
    )
    utility: UtilityConfig = Field(default_factory=UtilityConfig)
    sampling: Literal["qwcs", "qocs"] = Field(
        "qwcs", description="Draw clusters by the softmax of their values, or take them whole in order."
    )
    factor: float = Field(
        2.0, ge=0, description="Of qwcs: 0 draws clusters evenly; the larger, the more the best ones alone."
    )
    standardise: Literal["z", "rank"] = Field(
        "z", description="What the factor multiplies: values less mean over deviation, or ranks spread over -1 to 1."
    )
    curves: int = Field(
        4, ge=0, le=20, description="Points of the removal curves; each costs two evaluations of the budget."
    )

    def needs(self) -> frozenset[str]:
        """The model."""
        return MODEL

    def uses(self) -> frozenset[str]:
        """A target, or a part of the rows is held out; and a budget."""
        return TARGET | BUDGET

    def tunes(self) -> tuple[int, int]:
        """As the utility is set."""
        return self.utility.rank, self.utility.batch_size

    @field_validator("estimator")
    @classmethod
    def _known(cls, value: Any) -> Any:
        settings = {"type": value} if isinstance(value, str) else {"type": "auto", **value}
        name = str(settings["type"])
        known = ["auto", *(n for n in family("valuation").names() if n != "knn")]  # that one is for its own utility
        if name not in known:
            raise ValueError(f"unknown valuation method {name!r}{suggest(name, known)} (known: {', '.join(known)})")
        allowed = {"type"} if name == "auto" else set(family("valuation").load_config(name).model_fields)
        if unknown := sorted(set(settings) - allowed):
            raise ValueError(
                f"valuation method {name!r} has no setting {unknown[0]!r}{suggest(unknown[0], allowed)} "
                f"(known: {', '.join(sorted(allowed - {'type'})) or 'none'})"
            )
        if name != "auto":
            try:
                validate(family("valuation").load_config(name), settings, what=f"valuation method {name!r}")
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _no_idle_setting(self) -> ShedConfig:
        """A setting that would change nothing is a misunderstanding, so it is refused."""
        idle: dict[str, tuple[str, ...]] = {
            f"by: {self.by}": ("players", "embedding") if self.by != "embedding" else (),
            "sampling: qocs": ("factor", "standardise") if self.sampling == "qocs" else (),
            f"mode: {self.mode}": {
                "standard": (),
                "shed-paper": ("estimator", "standardise", "proxies", "surrogate"),
                "shed-release": ("estimator", "standardise", "proxies", "surrogate", "factor", "stability"),
            }[self.mode],
        }
        for where, names in idle.items():
            for name in names:
                if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"{name} changes nothing with {where}; leave it out")
        takes = self.estimator_name in ("auto", "control_variate")
        if self.surrogate == "in_run" and not takes:
            raise ValueError(f"surrogate: in_run is for estimator auto or control_variate, not {self.estimator_name!r}")
        if self.surrogate == "none" and self.estimator_name == "control_variate":
            raise ValueError("estimator control_variate corrects a surrogate; leave surrogate: none out")
        return self

    @property
    def estimator_name(self) -> str:
        """Name of the valuation method."""
        return self.estimator if isinstance(self.estimator, str) else str(self.estimator.get("type", "auto"))


class ScoresConfig(MethodConfig):
    """Scores of an earlier selection, by the ids of the rows: no model is run."""

    type: Literal["scores"] = "scores"
    path: ScoresInput = Field(description="Folder of an earlier selection, or its scores.parquet.")
    term: OptionalScoresInput = Field(
        None, description="Scores of another selection that are added to them, as daar's diversity to shed's values."
    )
    weight: float = Field(1.0, description="Of the term; negative to take rows that score low there.")
    standardise: Literal["z", "rank"] = Field(
        "z", description="What is added up: scores less mean over deviation, or ranks spread over -1 to 1."
    )

    @model_validator(mode="after")
    def _no_idle_setting(self) -> ScoresConfig:
        fields = type(self).model_fields
        for name in ("weight", "standardise"):
            if self.term is None and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is about a term that is added; give term, or leave it out")
        return self


def needs_of(embedding: Any) -> frozenset[str]:
    """What an embedding needs beside the rows."""
    return MODEL if isinstance(embedding, HiddenEmbedding) else frozenset()


SelectMethod = Annotated[SerializeAsAny[MethodConfig], FamilyMethod("selection", "random")]
Keep = Annotated[str, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}]})]
_LIST = "a file of rows, which are known by their ids, or a .txt file with an id per line."
_MODEL_FOR = {"length": ": its tokenizer defines a token"}
_KEEP = re.compile(r"^(\d+(?:\.\d+)?)(%|tok)?$")


def _as_share(value: Any) -> Any:
    """The exact number of "20%"; anything else is left to be refused or taken as it is."""
    match = _KEEP.match(str(value))
    return Decimal(match[1]) / 100 if match and match[2] == "%" else value


Share = Annotated[
    Decimal,
    BeforeValidator(_as_share),
    Field(ge=0, le=1, description="As 20%, or 0.2."),
    PlainSerializer(lambda v: f"{v * 100:f}%", return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": "%$"}, {"type": "number", "minimum": 0, "maximum": 1}]}),
]


class SelectConfig(RowsConfig):
    """Choose the rows worth training on."""

    rows: RowsInput = Field(min_length=1, description="Rows to choose from.")
    method: SelectMethod = Field(default_factory=RandomConfig)
    model: OptionalModelInput = Field(None, description="Scores the rows; its tokenizer counts tokens.")
    keep: Keep = Field("10%", description="A share of the usable rows (10%), a count (500) or tokens (200000tok).")
    target: RowsInput = Field((), description="Rows like those the model is wanted for; none may be in rows.")
    overlap: Literal["refuse", "leave_out"] = Field(
        "refuse", description="What to do about rows that repeat a row of the target: stop, or leave them out."
    )
    budget: int | None = Field(None, ge=4, description="Most evaluations of a utility (tune and score).")
    workers: Annotated[int, NoResultMark()] = Field(
        1, ge=1, description="Processes that evaluate at the same time; each holds a copy of the model."
    )
    ray: Annotated[str | None, NoResultMark()] = Field(
        None, description="Evaluate on a Ray cluster: its address, or `local` to start one here (extra `ray`)."
    )
    must_keep: OptionalFileInput = Field(None, description="Rows to keep whatever their score: " + _LIST)
    must_drop: OptionalFileInput = Field(None, description="Rows to leave out: " + _LIST)
    quota: dict[str, Share] = Field(
        {}, description="Group -> its share of what is kept (code: 20%); other groups share the rest by score."
    )
    quota_by: Literal["domain", "source", "cluster"] = Field(
        "domain", description="What a group of `quota` is: a label, or the method's own clusters or pseudo-domains."
    )
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
    def _fits(self) -> SelectConfig:
        name, needs = self.method.type, self.method.needs()
        if self.model is None and ("model" in needs or self.keep.endswith("tok")):
            what = f"method {name!r}" if "model" in needs else f"keep {self.keep!r}"
            raise ValueError(f"{what} needs a model (--model)" + _MODEL_FOR.get(name, ""))
        if not self.target and "target" in needs:
            raise ValueError(f"method {name!r} needs a target (--target ROWS): rows like those the model is wanted for")
        for field in ("target", "budget"):
            if getattr(self, field) and field not in needs | self.method.uses():
                raise ValueError(f"method {name!r} uses no {field}; leave --{field} out, or choose another method")
        if sum(self.quota.values()) > 1:
            raise ValueError(
                f"quota: the shares make {sum(self.quota.values()) * 100:f}%; together they are at most 100%"
            )
        if getattr(self.method, "rounds", 1) > 1 and (self.quota or self.must_keep):
            raise ValueError("rounds tune on what the method alone would keep; leave quota and must_keep out of them")
        if self.quota_by != "domain" and not self.quota:
            raise ValueError("quota_by says what the groups of quota are; give quota, or leave it out")
        if self.overlap != "refuse" and not self.target:
            raise ValueError("overlap says what to do about rows of a target; give one (--target), or leave it out")
        if (self.workers > 1 or self.ray is not None) and "budget" not in needs | self.method.uses():
            raise ValueError(f"method {name!r} evaluates no utility, so --workers and --ray change nothing")
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
