"""Settings of `daar` and `band`, the methods that look at domains."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from honeloom.config.base import Config, OptionalFileInput, OptionalModelInput
from honeloom.config.methods import MethodConfig
from honeloom.selection.config import Embedding, HiddenEmbedding, UtilityConfig, needs_of

__all__ = ["BandConfig", "DaarConfig", "RoundTuning", "limits_of"]

MODEL = frozenset({"model"})
EARLY = 0.33
"""Of the model's depth: in the paper any of the first third of the layers will do for the probe, and at the input
embedding, where the paper looks for domains, clusters agree with them less."""
SEARCH = "search"
_BAND = re.compile(r"^(\d{1,3})-(\d{1,3})$")


class RoundTuning(Config):
    """The tuning between two rounds: LoRA adapters on the rows of the last choice."""

    epochs: int = Field(1, ge=1, description="Passes over the chosen rows.")
    batch_size: int = Field(16, ge=1, description="Rows per step.")
    lr: float = Field(2e-4, gt=0, description="Learning rate of AdamW, falling linearly to zero.")
    rank: int = Field(8, ge=1, description="Of the LoRA adapters, on every linear layer.")


class DaarConfig(MethodConfig):
    """DaaR: rows whose domain a probe of the model is least sure of."""

    type: Literal["daar"] = "daar"
    seeds: OptionalFileInput = Field(
        None, description="File of rows with a `domain`, a few of each: what the domains are. Default: clusters."
    )
    domains: dict[str, str] = Field(
        {}, description="Name -> one line that says what belongs to it; the model writes a few rows of each."
    )
    generator: OptionalModelInput = Field(None, description="Writes the rows of `domains`; default: the model itself.")
    samples: int = Field(10, ge=3, description="Rows that are written for a domain.")
    similarity: float = Field(
        0.85, gt=0, lt=1, description="Written rows of a domain that are as alike as this (cosine) are refused."
    )
    clusters: int | None = Field(
        None, ge=2, description="Domains where none are given; default: as many as clusterings of the rows agree on."
    )
    embedding: Embedding = Field(
        default_factory=lambda: HiddenEmbedding(depth=EARLY), description="What domains are told apart by."
    )
    depth: float = Field(
        EARLY, ge=0, le=1, description="Of the model, where the probe reads; 0 is the input embedding."
    )
    sweep: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (), description="Depths to try instead; the probe with the least loss on rows it did not learn from stays."
    )
    folds: int = Field(2, ge=2, le=20, description="Parts of the rows; each is scored by a probe of the other parts.")
    probe_rows: OptionalFileInput = Field(
        None, description="File of other rows, without labels, that the domains and the probe are learnt from."
    )
    reward: Literal["entropy", "predicted"] = Field(
        "entropy", description="The probe's entropy, or as in the paper what a second network predicts of it."
    )
    choice: Literal["draw", "top"] = Field(
        "draw",
        description="Draw the same share of every pseudo-domain, unsure rows more likely; or take the highest scores, "
        "as in the paper.",
    )
    factor: float = Field(
        0.5, ge=0, description="Of draw: weight of a row is exp(factor x its rank among its domain's, from -1 to 1)."
    )
    focus: str | None = Field(
        None, description="A domain to take from first: the top half of its rows for a tenth of any other's."
    )
    rounds: int = Field(
        1, ge=1, le=20, description="The model is tuned on what a round chooses, and probed again; 1 is the paper."
    )
    tuning: RoundTuning = Field(default_factory=RoundTuning, description="Between two rounds.")

    def needs(self) -> frozenset[str]:
        """The model that is probed."""
        return MODEL

    def tunes(self) -> tuple[int, int] | None:
        """As set, where there is a second round."""
        return (self.tuning.rank, self.tuning.batch_size) if self.rounds > 1 else None

    @model_validator(mode="after")
    def _fits(self) -> DaarConfig:
        given = [name for name in ("seeds", "domains", "clusters") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what the domains are; give one of them")
        if len(self.domains) == 1:
            raise ValueError("domains names one, and the entropy of one domain is 0; name at least 2")
        idle = [
            n for n in ("generator", "samples", "similarity") if getattr(self, n) != type(self).model_fields[n].default
        ]
        if idle and not self.domains:
            raise ValueError(f"{' and '.join(idle)}: about rows that a model writes; give domains, or leave them out")
        fields = type(self).model_fields
        if self.sweep and self.depth != fields["depth"].default:
            raise ValueError("depth and sweep each say where the probe reads; give one of them")
        if self.probe_rows is not None and self.folds != fields["folds"].default:
            raise ValueError("folds are parts of the rows to choose from; with probe_rows there are none, leave it out")
        if self.choice == "top" and self.factor != fields["factor"].default:
            raise ValueError("factor is about rows that are drawn; leave it out, or set choice: draw")
        if self.rounds == 1 and self.tuning != RoundTuning():
            raise ValueError("tuning is done between rounds; set rounds to 2 or more, or leave it out")
        if (given in (["seeds"], ["domains"]) or self.probe_rows is not None) and self.embedding.type == "file":
            raise ValueError(
                "embedding 'file' has no vectors of the seed or probe rows; use hidden, tfidf or another encoder"
            )
        return self


class BandConfig(MethodConfig):
    """A band of every domain's rows by their diversity."""

    type: Literal["band"] = "band"
    axis: Literal["inter", "intra"] | None = Field(
        None,
        description="Closeness to the other domains' centroids, from the farthest on; or to the row's own, from the "
        "closest on. Default: inter; a search tries both.",
    )
    band: str = Field(
        "80-100", description="Percentiles of the axis that are kept, as 0-20; search tunes on every fifth to find out."
    )
    by: Literal["cluster", "domain", "source"] = Field(
        "cluster", description="What a domain is: clusters of the rows, or a label."
    )
    clusters: int | None = Field(
        None, ge=2, description="Domains of `by: cluster`; default: as many as clusterings of the rows agree on."
    )
    embedding: Embedding = Field(
        default_factory=lambda: HiddenEmbedding(depth=EARLY), description="What makes rows comparable."
    )
    utility: UtilityConfig = Field(default_factory=UtilityConfig, description="Of a search: how bands are compared.")

    @property
    def searches(self) -> bool:
        """Whether bands are compared by tunings."""
        return self.band == SEARCH

    def needs(self) -> frozenset[str]:
        """What the embedding needs; a search tunes."""
        return needs_of(self.embedding) | (MODEL if self.searches else frozenset())

    def uses(self) -> frozenset[str]:
        """A search takes a target, or a part of the rows is held out; and a budget."""
        return frozenset({"target", "budget"}) if self.searches else frozenset()

    def tunes(self) -> tuple[int, int] | None:
        """As the utility of a search is set."""
        return (self.utility.rank, self.utility.batch_size) if self.searches else None

    @field_validator("band")
    @classmethod
    def _readable(cls, value: str) -> str:
        match = _BAND.match(value)
        if value == SEARCH:
            return value
        if not match or not 0 <= int(match[1]) < int(match[2]) <= 100:
            raise ValueError("use two percentiles from 0 to 100, the lower first, like 0-20; or search")
        return value

    @model_validator(mode="after")
    def _fits(self) -> BandConfig:
        if self.by != "cluster" and self.clusters is not None:
            raise ValueError(f"by {self.by!r} takes the labels as domains; leave clusters out, or set by: cluster")
        if self.utility != UtilityConfig() and not self.searches:
            raise ValueError("utility compares the bands of a search; set band: search, or leave it out")
        return self


def limits_of(band: str) -> tuple[float, float]:
    """A band in percent, from 0 to 100."""
    low, _, high = band.partition("-")
    return float(low), float(high)
