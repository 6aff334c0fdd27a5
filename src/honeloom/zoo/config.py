"""Settings of `glue`: the zoo, the rows, and how it is clustered, searched, merged and mixed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from honeloom.config.base import Config, ModelInput, NoResultMark, OptionalModelInput, RowsInput, VerbConfig, Withdrawn
from honeloom.config.methods import FamilyMethod, MethodConfig, default_type
from honeloom.merging.config import LinearConfig
from honeloom.merging.merge_config import MergeMethod
from honeloom.registry import family

__all__ = ["Clustering", "GlueConfig", "LeftOut", "Mixture", "Target", "ZooModel"]

SearchMethod = Annotated[SerializeAsAny[MethodConfig], FamilyMethod("search", "coefficient")]
RoutingMethod = Annotated[SerializeAsAny[MethodConfig], FamilyMethod("routing", "rows")]
Level = Literal["model", "block", "ffn", "stack"]


def _default(kind: str, name: str) -> MethodConfig:
    config: MethodConfig = family(kind).load_config(name)()
    return config


class ZooModel(Config):
    """One model of the zoo."""

    model: ModelInput
    name: str = Field("", description="In reports; default: the folder's name.", pattern=r"^[A-Za-z0-9._-]*$")


class LeftOut(Config):
    """Something in the zoo's folder that is no model."""

    model: str
    reason: str


class Clustering(Config):
    """What counts as one family."""

    type: Literal["leader", "average", "complete"] = Field(
        "leader", description="leader is the paper's rule; the others cut a dendrogram of that linkage."
    )
    measure: Literal["weights", "deltas"] = Field(
        "weights", description="Similarity of the weights, as in the paper, or of the changes from the base."
    )
    threshold: float = Field(0.95, ge=-1, lt=1, description="Models of one family are more similar than this.")


class Target(Config):
    """What is to become better, on the search rows."""

    metric: Literal["auto", "bits_per_char", "loss", "accuracy"] = Field(
        "auto", description="auto: accuracy where all rows are multiple choice, else bits per character."
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="Weight of each domain; those left out count 1, or 0 once some are given."
    )

    @field_validator("weights")
    @classmethod
    def _some_count(cls, value: dict[str, float]) -> dict[str, float]:
        if value and not any(value.values()):
            raise ValueError("all weights are 0; give at least one domain a weight above 0")
        return value


class Mixture(Config):
    """One way to combine what cannot, or should not, be merged."""

    level: Level = Field("model", description="What is routed: whole models, blocks or FFNs; stack lays layers up.")
    experts: Literal["clusters", "members"] = Field(
        "clusters", description="The merged model of every cluster, or the models as they came."
    )
    router: RoutingMethod = Field(default_factory=partial(_default, "routing", "rows"))
    top_k: int | None = Field(None, gt=0, description="Experts per token or sample; default: the level's.")
    dense_layers: int = Field(0, ge=0, description="First layers that stay dense and merged.")

    @model_validator(mode="after")
    def _fits(self) -> Mixture:
        if self.level in ("block", "ffn", "stack") and self.experts == "clusters":
            raise ValueError(
                f"level {self.level} takes models of one shape, and those of different clusters may have others; "
                "set experts: members, or level: model"
            )
        if self.level == "stack" and (self.top_k or self.dense_layers):
            raise ValueError("level stack routes nothing: leave top_k and dense_layers out")
        return self

    @property
    def name(self) -> str:
        """In reports and folders."""
        hybrid = f"-dense{self.dense_layers}" if self.dense_layers else ""
        routed = "" if self.level == "stack" else f"-{self.router.type}"
        return f"{self.level}-{self.experts}{routed}{hybrid}"


_MIXTURES = ("model-clusters", "model-members")


def _mixture(value: Any) -> Any:
    """A mixture by its name: level and experts."""
    if not isinstance(value, str):
        return value
    level, _, experts = value.partition("-")
    return {"level": level, "experts": experts or "members"}


class GlueConfig(VerbConfig):
    """Make one model of a zoo: cluster it, search merges, merge, mix, verify."""

    models: tuple[ZooModel, ...] = Field(min_length=1, description="The zoo.")
    base: OptionalModelInput = Field(None, description="What most of them were tuned from, where it is known.")
    search_rows: RowsInput = Field((), description="Rows by which merges and mixtures are chosen.")
    report_rows: RowsInput = Field(
        (), description="Rows of which nothing was chosen; without them, half of the search rows are kept for it."
    )
    budget: int | None = Field(
        None, gt=0, description="Most merges that are tried in a cluster; default: the search's."
    )
    only: Literal["clusters", "search", "merge"] | None = Field(None, description="Stop after this part.")
    cluster: Annotated[Clustering, default_type("leader")] = Field(default_factory=Clustering)
    search: SearchMethod = Field(default_factory=partial(_default, "search", "coefficient"))
    method: MergeMethod = Field(default_factory=LinearConfig)
    target: Target = Field(default_factory=Target)
    mixtures: tuple[Mixture, ...] = Field(
        default_factory=lambda: tuple(Mixture.model_validate(_mixture(name)) for name in _MIXTURES),
        description="What is tried beside merging, for example model-clusters or ffn-members; none with [].",
    )
    limit: int | None = Field(None, gt=0, description="Read only the first N rows.")
    strict: bool = Field(False, description="Stop at the first unusable row.")
    max_bad: float = Field(0.01, ge=0, le=1, description="Stop if more than this share of rows is unusable.")
    withdraw: Withdrawn = ()
    batch_size: int = Field(16, gt=0, description="Rows per forward pass.")
    max_length: int | None = Field(None, gt=1, description="Tokens per row; default: each model's limit, at most 2048.")
    threads: Annotated[int | None, NoResultMark()] = Field(None, ge=1, description="Threads; default: one per core.")
    left_out: Annotated[tuple[LeftOut, ...], NoResultMark()] = Field(
        (), description="What lies in the zoo's folder and is no model; for the report."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        return [{"model": str(v)} if isinstance(v, str | PurePath) else v for v in value] if _listed(value) else value

    @field_validator("mixtures", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return [_mixture(v) for v in value] if _listed(value) else value

    @model_validator(mode="after")
    def _can_work(self) -> GlueConfig:
        if self.only != "clusters" and not self.search_rows:
            raise ValueError("give rows by which merges are chosen (search_rows), or only: clusters, which needs none")
        if self.cluster.measure == "deltas" and self.base is None:
            raise ValueError("cluster.measure deltas needs base: a change is a model minus its base")
        if getattr(self.method, "base", "unused") == "needed" and self.base is None:
            raise ValueError(f"method {self.method.type} needs base: a task vector is a model minus its base")
        doubled = sorted({n for n in self.names() if self.names().count(n) > 1})
        if doubled:
            raise ValueError(f"two models are called {doubled[0]!r}; give one of them another name")
        return self

    def names(self) -> list[str]:
        """Of the models, in their order."""
        return [m.name or default_name(m.model) for m in self.models]

    def named(self) -> Iterator[tuple[str, str]]:
        """Name and place among the inputs of every model."""
        for i, name in enumerate(self.names()):
            yield name, f"models.{i}.model"


def default_name(model: str) -> str:
    """The last part of a path or hub id; of `base+adapter`, the adapter's."""
    return PurePath(model.rpartition("+")[2]).name or model


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple)
