"""Embeddings of rows: the mean of a model's own hidden states over the tokens of a row, padding left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.backends.hf.mixture_model import layout_of
from honeloom.backends.hf.score import WINDOW, Progress, has_own_tokenizers, windows
from honeloom.backends.hf.states import mean_states
from honeloom.errors import SourceError
from honeloom.types.rows import Row

__all__ = ["Embedder", "layer_at"]

MOST_PADDING, FEWEST = 1.1, 4
"""Padded tokens per token of a batch, from so many rows on."""


def layer_at(model: Any, depth: float) -> int:
    """The layer whose output stands at a depth: -1, the input embedding, at 0, and the last one at 1."""
    return round(depth * model.config.get_text_config().num_hidden_layers) - 1


def _like_lengths(rows: Sequence[tuple[int, Encoded]], most: int) -> Iterator[list[tuple[int, Encoded]]]:
    """Batches of at most `most` rows, the longest first; few rows rather than much padding."""
    batch: list[tuple[int, Encoded]] = []
    tokens = 0
    for row in sorted(rows, key=lambda pair: (-len(pair[1].ids), pair[0])):
        tokens += len(row[1].ids)
        padded = (len(batch) + 1) * len(batch[0][1].ids) if batch else tokens
        if len(batch) == most or (len(batch) >= FEWEST and padded > MOST_PADDING * tokens):
            yield batch
            batch, tokens = [], len(row[1].ids)
        batch.append(row)
    if batch:
        yield batch


class Embedder:
    """A loaded model that turns rows into vectors: the port of methods that need embeddings.

    Parameters
    ----------
    model : transformers model
        In evaluation mode.
    encoder : Encoder
        Renders the rows.
    layer : int
        -1 is the input embedding, i the output of decoder layer i.
    batch_size : int
        Rows per forward pass.
    """

    def __init__(self, model: Any, encoder: Encoder, layer: int, batch_size: int) -> None:
        self.model = model
        self.encoder = encoder
        self.layer = layer
        self.batch_size = batch_size
        self.architecture = layout_of(model)

    @classmethod
    def open(
        cls, path: Path, *, base: Path | None = None, layer: float, loading: Loading, batch_size: int,
        max_length: int | None = None,
    ) -> Embedder:  # fmt: skip
        """Load model and tokenizer; `layer` is a depth from 0, the embedding, to 1, the last layer's output.

        Of a mixture of whole models: its encoder, for vectors of several models have nothing in common.

        Raises
        ------
        SourceError
            The folder has no tokenizer.
        """
        tokenizer = load_tokenizer(path, base=base)
        if tokenizer is None:
            raise SourceError(f"{path}: no tokenizer, so rows cannot be embedded; add tokenizer.json to the folder")
        model = load_model(path, base=base, loading=loading)
        if has_own_tokenizers(path):
            model = model.reader
        encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, max_length))
        return cls(model, encoder, layer_at(model, layer), batch_size)

    @property
    def size(self) -> int:
        """Length of a vector."""
        return int(self.model.config.get_text_config().hidden_size)

    def embed(self, rows: Iterable[Row], progress: Progress | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the vectors of the rows in order, some hundred at a time: (n, d); a row without tokens gives NaN."""
        shown = progress(rows, "embed rows", None) if progress else rows
        for window in windows((self._encode(row) for row in shown), self.batch_size * WINDOW):
            yield self._vectors(window)

    def _encode(self, row: Row) -> Encoded | None:
        try:
            return self.encoder.encode_choices(row)[row.answer] if row.kind == "choice" else self.encoder.encode(row)
        except UnrenderableRow:
            return None

    def _vectors(self, window: Sequence[Encoded | None]) -> npt.NDArray[np.float32]:
        """Batches of similar length, put back into the rows' order."""
        found = np.full((len(window), self.size), np.nan, dtype=np.float32)
        encoded = [(i, e) for i, e in enumerate(window) if e is not None and e.ids]
        groups = list(_like_lengths(encoded, self.batch_size))
        batches = ([e for _, e in group] for group in groups)
        advice = [f"--batch-size {max(1, self.batch_size // 2)}", f"--max-length {self.encoder.max_length // 2}"]
        with memory_guard(self.model.device, "embedding rows", advice):
            for group, vectors in zip(
                groups, mean_states(self.model, self.architecture, batches, self.layer), strict=True
            ):
                found[[i for i, _ in group]] = vectors.to(torch.float32).cpu().numpy()
        return found
