"""Rows that routers are made from, trained on and looked at: read, sampled, encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.load import load_config, load_tokenizer, token_limit
from honeloom.backends.hf.router_inputs import Span, row_losses
from honeloom.backends.hf.score import prompt_length
from honeloom.data.sources import RowFile
from honeloom.errors import RowsError, SourceError
from honeloom.merging.engine.sources import ModelSource
from honeloom.mixture.config import MixConfig
from honeloom.mixture.own_format import PROMPT_TOKENS
from honeloom.ops.noise import keyed_uniform
from honeloom.stages.mix_inputs import Parts
from honeloom.stages.rows import read_split, tell_rejected
from honeloom.stages.work import Work
from honeloom.types.rows import Row, Turn, Where

__all__ = [
    "Domains", "encode_rows", "expert_losses", "read_domains", "read_tuning_rows", "sample_rows",
    "sample_spans", "prompt_spans",
]  # fmt: skip

Open = Callable[[Work[MixConfig], ModelSource], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Domains:
    """Rows of the experts' domains.

    Attributes
    ----------
    rows : tuple of Row
        Of all experts, one after another, or without labels.
    encoded : tuple of Encoded
        As the router's model reads them.
    labels : Tensor or None
        (R,) the expert of each; None where nobody has said.
    """

    rows: tuple[Row, ...]
    encoded: tuple[Encoded, ...]
    labels: torch.Tensor | None

    def spread(self, count: int) -> list[Span]:
        """Some tokens of every row, evenly spaced."""
        return [Span(row.ids, "spread", count) for row in self.encoded]

    def told(self, work: Work[MixConfig], labels: torch.Tensor) -> None:
        """Say how many rows each expert has got."""
        counts = torch.bincount(labels, minlength=len(work.config.experts)).tolist()
        shares = ", ".join(f"{name} {n}" for name, n in zip(work.config.names, counts, strict=True))
        work.log.say(f"mix: rows by the expert of least loss: {shares}")


def read_domains(work: Work[MixConfig], parts: Parts) -> Domains:
    """Read what the router is made from: rows of each expert, or rows without labels."""
    config: Any = work.config.router
    source = parts.encoder or parts.trunk
    encoder = _encoder(source)
    if config.rows:
        rows = sample_rows(work, "router.rows", config.examples)
        rows, encoded = encode_rows(work, rows, encoder, "router.rows")
        return Domains(tuple(rows), tuple(encoded), None)
    found, ids, labels = list[Row](), list[Encoded](), list[int]()
    for e in range(len(parts.experts)):
        place = f"experts.{e}.rows"
        rows, encoded = encode_rows(work, sample_rows(work, place, config.examples), encoder, place)
        found += rows
        ids += encoded
        labels += [e] * len(rows)
    return Domains(tuple(found), tuple(ids), torch.tensor(labels))


def sample_rows(work: Work[MixConfig], place: str, examples: int) -> list[Row]:
    """A seeded sample of the rows of a field."""
    files: list[RowFile] = [f for found in work.rows(place) for f in found.files]
    rows = read_split(files, split=None, max_bad=1.0)
    tell_rejected(work, rows)
    draws = keyed_uniform(work.config.seed, f"mix/{place}", rows.ids)
    order = sorted(range(len(rows)), key=lambda i: (draws[i], rows.ids[i]))
    return list(rows.take(order[:examples]))


def _encoder(source: ModelSource, limit: int | None = None) -> Encoder:
    tokenizer = load_tokenizer(source.tokenizer_folder)
    if tokenizer is None:
        raise SourceError(f"{source.name}: no tokenizer, so it cannot read rows; add tokenizer.json")
    return Encoder(tokenizer, token_limit(load_config(source.folder), tokenizer, limit), train=False)


def encode_rows(
    work: Work[MixConfig], rows: Sequence[Row], encoder: Encoder, place: str
) -> tuple[list[Row], list[Encoded]]:
    """Rows that have a target, and their tokens with those that a router may read; RowsError if there is none."""
    usable: list[tuple[Row, Encoded]] = []
    for row in rows:
        try:
            encoded = encoder.encode_choices(row)[row.answer] if row.kind == "choice" else encoder.encode(row)
            prompt = prompt_length(encoded, encoder.prompt_ids(row), PROMPT_TOKENS)
        except UnrenderableRow as error:
            work.log.event("skipped", row=row.id, reason=str(error))
            continue
        if encoded.targets:
            usable.append((row, replace(encoded, prompt=prompt)))
    if not usable:
        raise RowsError(
            f"{place}: none of the {len(rows)} rows has anything to predict within {encoder.max_length} tokens; look "
            "at them with `honeloom rows preview`"
        )
    if len(usable) < len(rows):
        work.log.warn(f"{place}: {len(rows) - len(usable)} of {len(rows)} rows have nothing to predict; left out")
    return [row for row, _ in usable], [encoded for _, encoded in usable]


def sample_spans(encoded: Sequence[Encoded]) -> list[Span]:
    """The prompts of rows, each one vector: the mean of its tokens."""
    return [Span(row.ids[: row.prompt]) for row in encoded]


def prompt_spans(source: ModelSource, texts: Sequence[str], take: Any, *, chat: bool) -> list[Span]:
    """Texts as a model reads them, one vector each.

    Parameters
    ----------
    source : ModelSource
        The model.
    texts : sequence of str
        Prompts.
    take : {"mean", "last"}
        Of their tokens.
    chat : bool
        Whether they are what a user says, in the model's chat template: what a router of samples reads.
    """
    encoder = _encoder(source)
    found = []
    for text in texts:
        turn = Row("prompt", "chat", Where("prompts", 1), "prompts", turns=(Turn("user", text),))
        ids = encoder.prompt_ids(turn) if chat else encoder.encode(replace(turn, kind="text", text=text)).ids
        if not ids:
            raise SourceError(f"prompt {text!r}: has no token in the vocabulary of {source.name}; write another")
        found.append(Span(tuple(ids)[: encoder.max_length], take))
    return found


def expert_losses(work: Work[MixConfig], parts: Parts, rows: Sequence[Row], opened: Open) -> torch.Tensor:
    """Loss of every row under every expert, in nats per character; (R, E). Each expert reads with its own tokenizer."""
    found = torch.zeros(len(rows), len(parts.experts), dtype=torch.float64)
    seen: dict[str, int] = {}
    for e, source in enumerate(parts.experts):
        if source.name in seen:
            found[:, e] = found[:, seen[source.name]]
            continue
        seen[source.name] = e
        encoder = _encoder(source)
        usable, encoded = encode_rows(work, rows, encoder, f"rows read by {source.name}")
        if len(usable) < len(rows):
            raise RowsError(
                f"{source.name} cannot read {len(rows) - len(usable)} of the rows, so losses do not compare"
            )
        work.log.say(f"mix: losses of {len(rows)} rows under {source.name}")
        with opened(work, source) as model:
            sums = row_losses(model, encoded)
        found[:, e] = sums / torch.tensor([max(1, row.chars) for row in encoded], dtype=torch.float64)
    return found


def read_tuning_rows(work: Work[MixConfig], parts: Parts) -> tuple[list[Row], list[Encoded]]:
    """Rows that gates are trained on, as many as the steps can use, and their tokens."""
    settings = work.config.tune_router
    encoder = _encoder(parts.encoder or parts.trunk, settings.max_length)
    rows = sample_rows(work, "tune_router.rows", settings.steps * settings.batch_size)
    return encode_rows(work, rows, encoder, "tune_router.rows")
