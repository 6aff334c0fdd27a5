"""Settings of `daar` and `band`, the methods that look at domains."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from honeloom.config.base import InputMark, OptionalModelInput
from honeloom.config.methods import MethodConfig
from honeloom.selection.config import Embedding, HiddenEmbedding, needs_of

__all__ = ["BandConfig", "DaarConfig"]

MODEL = frozenset({"model"})
EARLY = 0.1
"""The paper's three blocks of 32; at the same depth clusters agree with domains better than at the input embedding."""
SeedFile = Annotated[str | None, BeforeValidator(lambda v: v if v is None else str(v)), InputMark("file")]
"""One file whose content matters, or none."""
_BAND = re.compile(r"^(\d{1,3})-(\d{1,3})$")


class DaarConfig(MethodConfig):
    """DaaR: rows whose domain a probe of the model is least sure of."""

    type: Literal["daar"] = "daar"
    seeds: SeedFile = Field(
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
    folds: int = Field(2, ge=2, le=20, description="Parts of the rows; each is scored by a probe of the other parts.")
    reward: Literal["entropy", "predicted"] = Field(
        "entropy", description="The probe's entropy, or as in the paper what a second network predicts of it."
    )
    focus: str | None = Field(
        None, description="A domain to take from first: the top half of its rows for a tenth of any other's."
    )

    def needs(self) -> frozenset[str]:
        """The model that is probed."""
        return MODEL

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
        if given in (["seeds"], ["domains"]) and self.embedding.type == "file":
            raise ValueError("embedding 'file' has no vectors of the seed rows; use hidden, tfidf or another encoder")
        return self


class BandConfig(MethodConfig):
    """A band of every domain's rows by their diversity."""

    type: Literal["band"] = "band"
    axis: Literal["inter", "intra"] = Field(
        "inter",
        description="Closeness to the other domains' centroids, from the farthest on; or to the row's own, from the "
        "closest on.",
    )
    band: str = Field("80-100", description="Percentiles of the axis that are kept, as 0-20.")
    by: Literal["cluster", "domain", "source"] = Field(
        "cluster", description="What a domain is: clusters of the rows, or a label."
    )
    clusters: int | None = Field(
        None, ge=2, description="Domains of `by: cluster`; default: as many as clusterings of the rows agree on."
    )
    embedding: Embedding = Field(
        default_factory=lambda: HiddenEmbedding(depth=EARLY), description="What makes rows comparable."
    )

    def needs(self) -> frozenset[str]:
        """What the embedding needs."""
        return needs_of(self.embedding)

    def limits(self) -> tuple[float, float]:
        """The band in percent, from 0 to 100."""
        low, _, high = self.band.partition("-")
        return float(low), float(high)

    @field_validator("band")
    @classmethod
    def _readable(cls, value: str) -> str:
        match = _BAND.match(value)
        if not match or not 0 <= int(match[1]) < int(match[2]) <= 100:
            raise ValueError("use two percentiles from 0 to 100, the lower first, like 0-20")
        return value

    @model_validator(mode="after")
    def _fits(self) -> BandConfig:
        if self.by != "cluster" and self.clusters is not None:
            raise ValueError(f"by {self.by!r} takes the labels as domains; leave clusters out, or set by: cluster")
        return self
