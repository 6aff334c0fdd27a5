"""Merges measured on rows without a checkpoint: computed into one model in memory, and scored there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.live_weights import LiveWeights, Pool
from honeloom.backends.hf.load import Loading, load_config, load_tokenizer, token_limit
from honeloom.backends.hf.score import Scorer, pad_batch
from honeloom.checkpoint.vocabulary import read_template
from honeloom.errors import ConfigError, RowsError, SourceError
from honeloom.merging.config import LinearConfig, TaskArithmeticConfig
from honeloom.merging.parameters import varies
from honeloom.merging.search.candidates import Candidate, group_rows
from honeloom.types.rows import Row

__all__ = ["LiveMerge", "Metric", "Pool"]

Metric = Literal["bits_per_char", "loss", "accuracy"]
Values = npt.NDArray[np.float64]


class _Encodings:
    """An encoder that encodes each row once; rows are told apart by what they are."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.max_length = encoder.max_length
        self._rows: dict[int, Encoded] = {}
        self._choices: dict[int, list[Encoded]] = {}
        self._held: list[Row] = []

    def encode(self, row: Row, *, empty_prompt: bool = False) -> Encoded:
        if empty_prompt:
            return self.encoder.encode(row, empty_prompt=True)
        if id(row) not in self._rows:
            self._held.append(row)
            self._rows[id(row)] = self.encoder.encode(row)
        return self._rows[id(row)]

    def encode_choices(self, row: Row) -> list[Encoded]:
        if id(row) not in self._choices:
            self._held.append(row)
            self._choices[id(row)] = self.encoder.encode_choices(row)
        return self._choices[id(row)]

    def count_tokens(self, text: str) -> int:
        return self.encoder.count_tokens(text)


class LiveMerge:
    """Measures candidates on rows: the `CandidatePort` of a search.

    Parameters
    ----------
    pool : Pool
        The models.
    rows : sequence of Row
        What they are measured on. Rows that cannot be scored go to `left_out`; the others are `rows`, and numbers of
        rows count these.
    metric : {"bits_per_char", "loss", "accuracy"}
        Of a row: loss in bits over characters, loss in nats over tokens, or 1 for a wrong choice and 0 for the right
        one. With the first two, a multiple-choice row counts by its right choice.
    groups : int
        Contiguous groups of layers with weights of their own.
    names : sequence of str, optional
        What the models are called; as in the documents by default.
    loading, threads
        As in `LiveWeights`.
    batch_size, max_length : int
        Rows per forward pass, tokens per row at most.

    Raises
    ------
    SourceError
        The donor has no tokenizer.
    RowsError
        No row can be scored.
    ConfigError
        Accuracy of rows without choices, or more groups than layers.
    """

    def __init__(
        self,
        pool: Pool,
        rows: Sequence[Row],
        *,
        metric: Metric = "bits_per_char",
        groups: int = 1,
        names: Sequence[str] | None = None,
        loading: Loading | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        threads: int | None = None,
    ) -> None:
        if groups > pool.layers:
            raise ConfigError(f"{groups} groups of layers, and the models have {pool.layers} layers; set fewer groups")
        self.pool, self.metric = pool, metric
        self.models, self.groups = tuple(names or pool.models), group_rows(groups)
        self.weights = LiveWeights(pool, loading=loading, threads=threads)
        encoder = _encoder(pool, max_length)
        self._scorer = Scorer(self.weights.model, encoder, batch_size)
        self._encoder = encoder
        self.rows, self.left_out = self._usable(rows)
        if not self.rows:
            row, reason = self.left_out[0] if self.left_out else (None, "there is none")
            raise RowsError(f"none of the {len(rows)} rows can be scored; first {row.where if row else ''}: {reason}")

    def single(self, model: int, rows: Sequence[int]) -> Values:
        """Value and weight of some rows under one model as it is, (n, 2)."""
        self.weights.fill(self.pool.document_of_single(model))
        return self._score(rows)

    def measure(self, candidate: Candidate, rows: Sequence[int]) -> Values:
        """Value and weight of some rows under a candidate, (n, 2)."""
        self.weights.fill(self.pool.document(candidate))
        return self._score(rows)

    def gradient(self, candidate: Candidate, rows: Sequence[int], factors: Values) -> tuple[Values, Values]:
        """Value and weight of some rows, and the gradient (G, N) of the sum of factor times value in the weights.

        The rounding of the merge to its output type counts as none.

        Raises
        ------
        ConfigError
            The metric or the merge method has no such gradient.
        """
        if self.metric == "accuracy":
            raise ConfigError("accuracy has no gradient; use metric bits_per_char or loss, or search method cma")
        if not isinstance(self.pool.method, LinearConfig | TaskArithmeticConfig):
            raise ConfigError(
                f"{self.pool.method.type} is not differentiated in its weights; use linear or task_arithmetic, or "
                "search method cma"
            )
        if varies(getattr(self.pool.method, "scale", 1.0)):
            raise ConfigError("scale varies over tensors, which the gradient does not follow; give one number")
        self.weights.fill(self.pool.document(candidate))
        encoded = [self._encode(self.rows[i]) for i in rows]
        per_nat = 1 / math.log(2) if self.metric == "bits_per_char" else 1.0
        values = np.array([[0.0, e.chars if self.metric == "bits_per_char" else e.targets] for e in encoded])
        order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].ids), i))
        size = self._scorer.batch_size
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            sums = _losses(self.weights.model, [encoded[i] for i in picked])
            scale = torch.tensor([factors[i] * per_nat for i in picked], dtype=sums.dtype, device=sums.device)
            (sums * scale).sum().backward()
            values[picked, 0] = sums.detach().double().cpu().numpy() * per_nat
        return values, self.weights.slopes(candidate)

    def _score(self, rows: Sequence[int]) -> Values:
        """Rows with choices by their choices, the others by their losses."""
        picked = [self.rows[i] for i in rows]
        values = np.empty((len(picked), 2))
        choice = [i for i, row in enumerate(picked) if row.kind == "choice"]
        other = [i for i, row in enumerate(picked) if row.kind != "choice"]
        for i, (_, loss) in zip(other, self._scorer.losses(picked[i] for i in other), strict=True):
            values[i] = self._of(loss.loss_sum, loss.tokens, loss.chars)
        for i, (row, score) in zip(choice, self._scorer.choices(picked[i] for i in choice), strict=True):
            if self.metric == "accuracy":
                values[i] = float(score.best(per_char=False) != row.answer), 1.0
            else:
                right = row.answer
                values[i] = self._of(score.losses[right], score.tokens[right], score.chars[right])
        return values

    def _of(self, loss: float, tokens: int, chars: int) -> tuple[float, float]:
        return (loss / math.log(2), chars) if self.metric == "bits_per_char" else (loss, tokens)

    def _encode(self, row: Row) -> Encoded:
        """What is scored of a row."""
        return self._encoder.encode_choices(row)[row.answer] if row.kind == "choice" else self._encoder.encode(row)

    def _usable(self, rows: Sequence[Row]) -> tuple[tuple[Row, ...], list[tuple[Row, str]]]:
        kept, left_out = [], []
        for row in rows:
            if self.metric == "accuracy" and row.kind != "choice":
                raise ConfigError(f"{row.where}: a {row.kind} row has no choices, so no accuracy; use bits_per_char")
            reason = self._fault(row)
            if reason:
                left_out.append((row, reason))
            else:
                kept.append(row)
        return tuple(kept), left_out

    def _fault(self, row: Row) -> str:
        """Why a row cannot be scored; empty if it can."""
        try:
            encoded = self._encode(row)
        except UnrenderableRow as error:
            return str(error)
        if not encoded.targets:
            return f"no scored token within {self._encoder.max_length} tokens"
        return "" if encoded.chars or self.metric != "bits_per_char" else "no scored character"


def _encoder(pool: Pool, max_length: int | None) -> Any:
    """Of the donor's tokenizer, with the chat template that the documents choose."""
    donor = pool.donor
    tokenizer = load_tokenizer(donor.tokenizer_folder, base=donor.folder)
    if tokenizer is None:
        raise SourceError(f"{donor.name}: no tokenizer, so rows cannot be read by it; add tokenizer.json to the folder")
    giver = pool.sources.get(pool.settings.get("chat_template", ""))
    if giver is not None:
        tokenizer.chat_template = read_template(giver.tokenizer_folder)
    return _Encodings(Encoder(tokenizer, token_limit(load_config(donor.folder), tokenizer, max_length)))


def _losses(model: Any, batch: Sequence[Encoded]) -> torch.Tensor:
    """Summed loss of each row in nats, with its graph, (B,)."""
    ids, _, labels = pad_batch(batch, model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:].to(logits.device)
    sums = []
    for i in range(len(batch)):
        scored = targets[i] != -100
        sums.append(torch.nn.functional.cross_entropy(logits[i, scored].float(), targets[i, scored], reduction="sum"))
    return torch.stack(sums)
