"""Losses of rows under a model: streamed, padded right, masked, accumulated in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.checkpoint.folders import read_config
from honeloom.errors import NotFiniteError, SourceError
from honeloom.registry import load_target
from honeloom.types.rows import Row

__all__ = [
    "ChoiceScore",
    "Progress",
    "RowLoss",
    "Scorer",
    "has_own_tokenizers",
    "pack_batch",
    "pad_batch",
    "prompt_length",
    "windows",
]

Progress = Callable[[Iterable[Row], str, int | None], Iterable[Row]]


def _no_progress(rows: Iterable[Row], label: str, total: int | None) -> Iterable[Row]:
    return rows


WINDOW = 64
"""Batches that are sorted by length together."""


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Summed loss of one row in nats, over `tokens` scored tokens and `chars` characters."""

    loss_sum: float
    tokens: int
    chars: int
    truncated: bool

    @property
    def mean(self) -> float:
        """Nats per scored token; NaN if nothing is scored."""
        return self.loss_sum / self.tokens if self.tokens else float("nan")


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """Summed loss of every choice, and its length in characters."""

    losses: tuple[float, ...]
    chars: tuple[int, ...]
    tokens: tuple[int, ...]

    def best(self, *, per_char: bool) -> int:
        """Index of the likeliest choice; ties go to the first."""
        values = [loss / max(1, c) if per_char else loss for loss, c in zip(self.losses, self.chars, strict=True)]
        return values.index(min(values))


class Scorer:
    """A loaded model with its tokenizer: the port of methods that need losses.

    Parameters
    ----------
    model : transformers model
        In evaluation mode.
    encoder : Encoder
        Renders the rows.
    batch_size : int
        Rows per forward pass.
    progress : callable, optional
        Wraps the rows to show progress, as `Log.track`.
    """

    def __init__(self, model: Any, encoder: Encoder, batch_size: int, progress: Progress = _no_progress) -> None:
        self.model = model
        self.encoder = encoder
        self.batch_size = batch_size
        self.progress = progress
        self.unscored: list[tuple[Row, str]] = []
        self._routes = bool(getattr(getattr(model, "config", None), "reads_prompt", False))

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
    ) -> Scorer:
        """Load model and tokenizer; SourceError if the folder has no tokenizer.

        Of a mixture of whole models: a scorer that reads every row by its model's own tokenizer.
        """
        if has_own_tokenizers(path):
            routed: Scorer = load_target("honeloom.backends.hf.routed:RoutedScorer").open(
                path, base=base, loading=loading, batch_size=batch_size, max_length=max_length, progress=progress
            )
            return routed
        tokenizer = load_tokenizer(path, base=base)
        if tokenizer is None:
            raise SourceError(f"{path}: no tokenizer, so rows cannot be read by it; add tokenizer.json to the folder")
        model = load_model(path, base=base, loading=loading)
        encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, max_length))
        return cls(model, encoder, batch_size, progress or _no_progress)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return self.encoder.count_tokens(text)

    def losses(self, rows: Iterable[Row], *, with_prompt: bool = True) -> Iterator[tuple[Row, RowLoss]]:
        """Yield every row with its loss, in order; rows that cannot be rendered go to `unscored`."""
        for window in windows(self._encode(rows, with_prompt), self.batch_size * WINDOW):
            sums = self.sums([encoded for _, encoded in window])
            for (row, encoded), total in zip(window, sums, strict=True):
                yield row, RowLoss(total, encoded.targets, encoded.chars, encoded.truncated)

    def choices(self, rows: Iterable[Row]) -> Iterator[tuple[Row, ChoiceScore]]:
        """Yield every multiple-choice row with the losses of its choices, in order."""
        for window in windows(((r, self._marked_choices(r)) for r in rows), self.batch_size * 8):
            sums = iter(self.sums([e for _, options in window for e in options]))
            for row, options in window:
                losses = tuple(next(sums) for _ in options)
                yield row, ChoiceScore(losses, tuple(e.chars for e in options), tuple(e.targets for e in options))

    def _encode(self, rows: Iterable[Row], with_prompt: bool) -> Iterator[tuple[Row, Encoded]]:
        total = len(rows) if isinstance(rows, Sized) else None
        for row in self.progress(rows, "score rows", total):
            try:
                encoded = self._marked(row, empty_prompt=not with_prompt)
            except UnrenderableRow as error:
                self.unscored.append((row, str(error)))
                continue
            if not encoded.targets:
                self.unscored.append((row, f"no scored token within {self.encoder.max_length} tokens"))
                continue
            yield row, encoded

    def _marked(self, row: Row, *, empty_prompt: bool) -> Encoded:
        """A row in tokens, and how many of them a router may read."""
        encoded = self.encoder.encode(row, empty_prompt=empty_prompt)
        if not self._routes:
            return encoded
        prompt = self.encoder.prompt_ids(row, empty_prompt=empty_prompt)
        return replace(encoded, prompt=prompt_length(encoded, prompt, self.model.config.spec.prompt_tokens))

    def _marked_choices(self, row: Row) -> list[Encoded]:
        """A question with each of its choices; a router may read the question, as far as it was kept."""
        options = self.encoder.encode_choices(row)
        return [replace(e, prompt=e.scored.index(True)) if self._routes else e for e in options]

    def sums(self, encoded: Sequence[Encoded]) -> list[float]:
        """Summed loss of each, computed in batches of similar length."""
        order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].ids), i))
        sums = [0.0] * len(encoded)
        for start in range(0, len(order), self.batch_size):
            picked = order[start : start + self.batch_size]
            batch = [encoded[i] for i in picked]
            with memory_guard(self.model.device, self._describe(batch), self._memory_advice()):
                values = self._batch_sums(batch)
            for i, value in zip(picked, values, strict=True):
                sums[i] = value
        return sums

    def _describe(self, batch: Sequence[Encoded]) -> str:
        return f"scoring {len(batch)} rows of up to {len(batch[0].ids)} tokens"

    def _memory_advice(self) -> list[str]:
        fewer = [f"--batch-size {self.batch_size // 2}"] if self.batch_size > 1 else []
        in_4_bits = getattr(self.model, "is_loaded_in_4bit", False)
        return [*fewer, f"--max-length {self.encoder.max_length // 2}", *([] if in_4_bits else ["--load-in 4bit"])]

    def _routing(self, batch: Sequence[Encoded], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a mixture that decides per row: the tokens that it decides by, so that it never reads the answer."""
        if not self._routes:
            return {}
        mask = torch.zeros_like(ids)
        for i, encoded in enumerate(batch):
            mask[i, : encoded.prompt] = 1
        return {"routing_mask": mask}

    @torch.inference_mode()
    def _batch_sums(self, batch: Sequence[Encoded]) -> list[float]:
        # Padding stands to the right of a causal model's tokens, so no mask is needed.
        ids, _, labels = pad_batch(batch, self.model.device)
        routing = self._routing(batch, ids)
        logits = self.model(input_ids=ids, use_cache=False, **routing).logits[:, :-1]
        targets = labels[:, 1:].to(logits.device)
        sums = torch.zeros(len(batch), dtype=torch.float64, device=logits.device)
        for i in range(len(batch)):  # row by row: fp32 copies of a batch's logits would be the peak of memory
            scored = targets[i] != -100
            losses = torch.nn.functional.cross_entropy(logits[i, scored].float(), targets[i, scored], reduction="none")
            sums[i] = losses.double().sum()
        if not torch.isfinite(sums).all():
            raise NotFiniteError("the model's loss is NaN or infinite; its weights or --dtype are unusable")
        return [float(s) for s in sums.cpu()]


def has_own_tokenizers(path: Path) -> bool:
    """Whether a folder holds a mixture of whole models, each with its own tokenizer."""
    return (path / "config.json").is_file() and read_config(path).get("model_type") == "honeloom_models"


def prompt_length(encoded: Encoded, prompt_ids: Sequence[int], prompt_tokens: int) -> int:
    """Tokens of a row that a router may read: those of its prompt, of a row without one the first few.

    A token in which the prompt ends and the answer begins is not read, and one that begins every
    text is no prompt.
    """
    same = takewhile(lambda pair: pair[0] == pair[1], zip(encoded.ids, prompt_ids, strict=False))
    length = sum(1 for _ in same)
    return length if length > 1 else min(len(encoded.ids), prompt_tokens)


def pad_batch(batch: Sequence[Encoded], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad to the right: ids, attention mask and labels (-100 where not scored), each (B, T), int64."""
    width = max(len(e.ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, encoded in enumerate(batch):
        n = len(encoded.ids)
        ids[i, :n] = torch.tensor(encoded.ids)
        mask[i, :n] = 1
        labels[i, :n] = torch.where(torch.tensor(encoded.scored), ids[i, :n], labels[i, :n])
    return ids.to(device), mask.to(device), labels.to(device)


def pack_batch(batch: Sequence[Encoded], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay rows end to end in sequences of at most `width` tokens: ids, positions, labels, each (S, T), int64.

    Positions begin at 0 with every row, and with the padding at the end. No row's first token
    is a label, so that no row predicts the next. Rows go, longest first, into the first sequence
    that has room.
    """
    sequences: list[list[Encoded]] = []
    for encoded in sorted(batch, key=lambda e: -len(e.ids)):
        room = (s for s in sequences if sum(len(e.ids) for e in s) + len(encoded.ids) <= width)
        chosen = next(room, None)
        if chosen is None:
            sequences.append([encoded])
        else:
            chosen.append(encoded)
    used = max(sum(len(e.ids) for e in s) for s in sequences)
    ids = torch.zeros(len(sequences), used, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, sequence in enumerate(sequences):
        start = 0
        for encoded in sequence:
            one, _, scored = pad_batch([encoded], ids.device)
            end = start + len(encoded.ids)
            ids[i, start:end], labels[i, start + 1 : end] = one[0], scored[0, 1:]
            positions[i, start:end] = torch.arange(end - start)
            start = end
        positions[i, start:] = torch.arange(used - start)
    return ids, positions, labels


def windows(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut a stream into lists of at most `size`."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
