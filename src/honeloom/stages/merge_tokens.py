"""Merging by tokens: the result's vocabulary, every model's rows in its order, and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from honeloom.checkpoint.vocabulary import Plan, Vocabulary, choose_template, write_tokenizer
from honeloom.errors import IncompatibleModelsError
from honeloom.merging.engine.embeddings import Layout, RowReader, combine, lay_out, permuted
from honeloom.merging.engine.layout import Part
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import Rows
from honeloom.merging.merge_config import MergeConfig, TokenizerConfig
from honeloom.stages.work import Work

__all__ = ["Matched", "match_tokens"]


@dataclass(frozen=True, slots=True)
class Matched:
    """Tokens of all models, matched.

    Attributes
    ----------
    plan : Plan
        The result's vocabulary.
    layout : Layout
        Where every row comes from.
    sources : mapping
        Models by their place in the configuration.
    origin : Path
        Tokenizer files that the result's are made from.
    """

    plan: Plan
    layout: Layout
    sources: Mapping[str, ModelSource]
    origin: Path

    def rows(self, parts: Sequence[Part]) -> dict[str, Rows]:
        """Reads of the tensors with one row per token, in the result's order."""
        by_name = {s.name: s for s in self.sources.values()}
        found = {}
        for part in parts:
            donor = by_name[self.plan.donor]
            if part.name not in donor.by_token:
                continue
            readers = [_reader(by_name[name], part.name) for name in self.layout.models]
            reads = dict(zip(self.layout.models, permuted(readers, self.layout), strict=True))
            models = tuple(reads[self.sources[place].name] for place, _ in part.models)
            base = reads[self.sources["base_model"].name] if part.base else None
            found[part.name] = Rows((self.layout.rows, *part.info.shape[1:]), models, base)
        return found

    def write(self, work: Work[MergeConfig]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the tokenizer files; returns the keys of config.json and of generation_config.json to set."""
        folders = {s.name: s.tokenizer_folder for s in self.sources.values()}
        template, words = choose_template(work.config.chat_template or "auto", folders, self.plan)
        written = write_tokenizer(self.plan, self.origin, work.dir, template)
        for finding in (*words, *written.words):
            work.log.say(f"merge: {finding}")
        return dict(written.config), dict(written.generation)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "source": self.plan.origin,
            "tokens": len(self.plan.tokens),
            "added": len(self.plan.new),
            "rows": self.layout.rows,
            "findings": [*self.plan.words, *self.layout.words],
        }


def _reader(source: ModelSource, name: str) -> RowReader:
    shape = source.info(name).shape
    return RowReader(partial(source.read, name), shape[0], shape[1] if len(shape) > 1 else 1)


def match_tokens(work: Work[MergeConfig], sources: Mapping[str, ModelSource], donor: ModelSource) -> Matched:
    """Choose the vocabulary and say what it means for each model.

    Raises
    ------
    IncompatibleModelsError
        A model has no tokenizer, or one that cannot be matched.
    ConfigError
        The vocabulary's source is no model of this merge.
    """
    settings = work.config.tokenizer or TokenizerConfig()
    distinct = {s.name: s for s in (donor, *sources.values())}
    vocabularies, rows = {}, {}
    for name, source in distinct.items():
        found = Vocabulary.read(source.tokenizer_folder)
        if found is None:
            raise IncompatibleModelsError(
                f"{name}: {source.tokenizer_folder} has no tokenizer files, so its tokens cannot be matched; "
                "leave tokenizer out if all models have the same vocabulary"
            )
        vocabularies[name] = found
        rows[name] = min((source.info(n).shape[0] for n in source.by_token), default=found.rows)
    plan = combine(vocabularies, donor.name, settings.source, settings.pad_to_multiple_of, rows)
    layout = lay_out(plan, settings.tokens)
    for finding in plan.words:
        work.log.say(f"merge: {finding}")
    for finding in layout.words:
        work.log.warn(finding)
    return Matched(plan, layout, sources, distinct[plan.origin].tokenizer_folder)
