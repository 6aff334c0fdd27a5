"""Mixtures of whole models at the level of text: every row is read by the tokenizer of the model it goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from honeloom.backends.hf.chat import Encoder, UnrenderableRow
from honeloom.backends.hf.generate import Generator, Prompter
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, max_positions, token_limit
from honeloom.backends.hf.score import WINDOW, ChoiceScore, Progress, RowLoss, Scorer, windows
from honeloom.errors import SourceError
from honeloom.types.rows import Row

__all__ = ["RoutedGenerator", "RoutedScorer", "open_tokenizers"]

Found = TypeVar("Found", RowLoss, ChoiceScore)


def open_tokenizers(
    path: Path, config: Any, base: Path | None = None
) -> tuple[PreTrainedTokenizerBase, list[PreTrainedTokenizerBase]]:
    """The encoder's tokenizer and every model's, of a mixture of whole models.

    Raises
    ------
    SourceError
        A tokenizer is not where config.json says.
    """
    names = [config.encoder.get("tokenizer"), *(e.get("tokenizer") for e in config.experts)]
    folders = [_within(path, name) for name in names]
    loaded: dict[Path, PreTrainedTokenizerBase] = {}
    for folder in folders:
        if folder not in loaded:
            found = load_tokenizer(folder)
            if found is None:
                raise SourceError(f"{folder}: no tokenizer, so no text can be read; add its tokenizer.json")
            loaded[folder] = found
    return loaded[folders[0]], [loaded[f] for f in folders[1:]]


def _within(path: Path, name: str | None) -> Path:
    """A folder below the mixture's; SourceError where config.json points elsewhere."""
    folder = path / name if name else path
    if not folder.resolve().is_relative_to(path.resolve()):
        raise SourceError(f"{path / 'config.json'}: the tokenizer {name!r} lies outside of the mixture's folder")
    return folder


class RoutedScorer(Scorer):
    """Scores every row by the model that the router picks for its prompt.

    Parameters
    ----------
    model : HoneloomModelsForCausalLM
        In evaluation mode.
    reader : Encoder
        Renders prompts for the router.
    experts : sequence of Scorer
        One per model, with the model's own encoder.
    batch_size : int
        Rows per forward pass.
    progress : callable, optional
        Wraps the rows to show progress.

    Attributes
    ----------
    routes : list of int
        The model of every row that was scored, in the order in which rows were given back.
    encoder : Encoder
        Of the model that takes the fewest tokens: `encoder.max_length` is where rows may be cut first.
    """

    def __init__(
        self, model: Any, reader: Encoder, experts: Sequence[Scorer], batch_size: int, progress: Progress | None = None
    ) -> None:
        shortest = min(experts, key=lambda s: s.encoder.max_length)
        super().__init__(model, shortest.encoder, batch_size, progress or (lambda rows, label, total: rows))
        self.reader = reader
        self.experts = list(experts)
        self.routes: list[int] = []

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        base: Path | None = None,
        loading: Loading | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> RoutedScorer:
        """Load the models and their tokenizers; SourceError if one is not there."""
        model = load_model(path, base=base, loading=loading)
        own, others = open_tokenizers(path, model.config)
        experts = [
            Scorer(inner, Encoder(tokenizer, token_limit(inner.config, tokenizer, max_length)), batch_size)
            for inner, tokenizer in zip(model.experts, others, strict=True)
        ]
        reader = Encoder(own, token_limit(model.reader.config, own, max_length))
        return cls(model, reader, experts, batch_size, progress)

    def losses(self, rows: Iterable[Row], *, with_prompt: bool = True) -> Iterator[tuple[Row, RowLoss]]:
        """Yield every row with its loss, in order; rows that cannot be rendered go to `unscored`."""
        total = len(rows) if isinstance(rows, Sized) else None
        for window in windows(self.progress(rows, "score rows", total), self.batch_size * WINDOW):
            yield from self._routed(
                window,
                lambda row: self._prompt(row, empty_prompt=not with_prompt),
                lambda scorer, picked: scorer.losses(picked, with_prompt=with_prompt),
            )

    def choices(self, rows: Iterable[Row]) -> Iterator[tuple[Row, ChoiceScore]]:
        """Yield every multiple-choice row with the losses of its choices, in order; the question alone is routed."""
        for window in windows(rows, self.batch_size * 8):
            yield from self._routed(
                window, lambda row: self._prompt(row, empty_prompt=False), lambda scorer, rows: scorer.choices(rows)
            )

    def _routed(
        self,
        window: Sequence[Row],
        read: Callable[[Row], Sequence[int]],
        score: Callable[[Scorer, Sequence[Row]], Iterator[tuple[Row, Found]]],
    ) -> Iterator[tuple[Row, Found]]:
        """Choose a model for every row, let each score its rows, and put them back in order."""
        rows, chosen = self._choose(window, read)
        found: dict[int, Found] = {}
        for expert, scorer in enumerate(self.experts):
            mine = [i for i, e in enumerate(chosen) if e == expert]
            waiting = iter(mine)
            for row, value in score(scorer, [rows[i] for i in mine]):
                found[next(i for i in waiting if rows[i] is row)] = value  # rows that were not scored are passed over
            self.unscored += scorer.unscored
            scorer.unscored.clear()
        for i in sorted(found):
            self.routes.append(chosen[i])
            yield rows[i], found[i]

    def _prompt(self, row: Row, *, empty_prompt: bool) -> Sequence[int]:
        """What the router reads of a row, in its own tokens: the end of a prompt that is too long is cut."""
        prompt = self.reader.prompt_ids(row, empty_prompt=empty_prompt)
        if len(prompt) > 1:
            return prompt[: self.reader.max_length]
        return self.reader.encode(row, empty_prompt=empty_prompt).ids[: self.model.config.spec.prompt_tokens]

    def _choose(self, window: Sequence[Row], read: Callable[[Row], Sequence[int]]) -> tuple[list[Row], list[int]]:
        """The rows that the router can read, and the model of each."""
        rows, prompts = [], []
        for row in window:
            try:
                ids = read(row)
            except UnrenderableRow as error:
                self.unscored.append((row, f"the router cannot read it: {error}"))
                continue
            if ids:
                rows.append(row)
                prompts.append(ids)
            else:
                self.unscored.append((row, "the router has no token to decide by"))
        return rows, self.model.choose(prompts, batch_size=self.batch_size)


class RoutedGenerator(Generator):
    """Answers every prompt by the model that the router picks for it.

    Parameters
    ----------
    model : HoneloomModelsForCausalLM
        In evaluation mode.
    encoder : Prompter
        Renders prompts for the router.
    experts : sequence of Generator
        One per model, with the model's own tokenizer and template.
    batch_size : int
        Prompts per forward pass.

    Attributes
    ----------
    routes : list of int
        The model of every prompt of the last call, in order.
    """

    def __init__(self, model: Any, encoder: Prompter, experts: Sequence[Generator], batch_size: int) -> None:
        super().__init__(model, encoder, batch_size)
        self.experts = list(experts)
        self.routes: list[int] = []

    @classmethod
    def open(
        cls, path: Path, *, base: Path | None = None, loading: Loading | None = None, batch_size: int = 16
    ) -> RoutedGenerator:
        """Load the models and their tokenizers; SourceError if one is not there."""
        model = load_model(path, base=base, loading=loading)
        own, others = open_tokenizers(path, model.config)
        experts = [
            Generator(inner, Prompter(tokenizer, max_positions(inner.config, tokenizer)), batch_size)
            for inner, tokenizer in zip(model.experts, others, strict=True)
        ]
        return cls(model, Prompter(own, max_positions(model.reader.config, own)), experts, batch_size)

    def _answer(
        self, prompts: Sequence[str], numbers: Sequence[int], seed: int, max_new_tokens: int, temperature: float,
        top_p: float,
    ) -> list[str]:  # fmt: skip
        limit = self.encoder.max_length
        read = [self.encoder.prompt(text)[:limit] for text in prompts]
        asked = [i for i, ids in enumerate(read) if ids]
        chosen = dict(zip(asked, self.model.choose([read[i] for i in asked], batch_size=self.batch_size), strict=True))
        self.routes = [chosen.get(i, 0) for i in range(len(prompts))]
        found = [""] * len(prompts)
        for expert, generator in enumerate(self.experts):
            mine = [i for i, e in enumerate(self.routes) if e == expert]
            texts = generator._answer(
                [prompts[i] for i in mine], [numbers[i] for i in mine], seed, max_new_tokens, temperature, top_p
            )
            for i, text in zip(mine, texts, strict=True):
                found[i] = text
        return found

    def vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Mean input embedding (n, d) of every text by the encoder, whose space all texts share."""
        return Generator(self.model.reader, self.encoder, self.batch_size).vectors(texts)
