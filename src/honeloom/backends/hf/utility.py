"""A tuning as a utility: what a set of rows is worth is the score of the model that was tuned on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.load import Loading, load_config, load_model, load_tokenizer, token_limit
from honeloom.backends.hf.local_steps import (
    build_optimizer,
    build_schedule,
    local_steps,
    restore_trainable,
    trainable_state,
)
from honeloom.backends.hf.score import Scorer
from honeloom.backends.hf.tune import add_lora
from honeloom.data.formats import content_digest
from honeloom.errors import SourceError
from honeloom.ops.noise import keyed_uniform
from honeloom.tuning.config import AdamWConfig
from honeloom.types.rows import Row

__all__ = ["TunableModel", "TuningUtility", "trainable"]

VERSION = 1
"""Raised when the numbers of a utility change, so that a ledger does not mix them."""


@dataclass(frozen=True, slots=True)
class TunableModel:
    """How to open a model with fresh LoRA adapters, here or in another process.

    Attributes
    ----------
    path, base : Path
        Of the model; `base` where `path` is an adapter.
    digest : str
        Of its content.
    loading : Loading
        Device and number type.
    rank : int
        Of the adapters, on every linear layer.
    seed : int
        Of their first weights.
    batch_size : int
        Rows per forward pass when scoring.
    max_length : int or None
        Tokens per row.
    """

    path: Path
    base: Path | None
    digest: str
    loading: Loading
    rank: int
    seed: int
    batch_size: int
    max_length: int | None

    def encoder(self) -> Encoder:
        """How it reads rows, without its weights; SourceError if the folder has no tokenizer."""
        tokenizer = load_tokenizer(self.path, base=self.base)
        if tokenizer is None:
            raise SourceError(f"{self.path}: no tokenizer, so rows cannot be read by it; add tokenizer.json")
        limit = token_limit(load_config(self.base or self.path), tokenizer, self.max_length)
        return Encoder(tokenizer, limit, train=True)

    def open(self) -> Scorer:
        """Load it."""
        encoder = self.encoder()
        model = load_model(self.path, base=self.base, loading=self.loading)
        if self.base is not None:  # an adapter becomes a part of the model that is tuned
            model = model.merge_and_unload()
        tuned = add_lora(
            model, rank=self.rank, alpha=None, dropout=0.0, targets="all-linear", rslora=False, seed=self.seed
        )
        return Scorer(tuned.eval(), encoder, self.batch_size)

    def describe(self) -> Mapping[str, Any]:
        """What its numbers depend on."""
        loading = {k: v for k, v in asdict(self.loading).items() if k != "spread"}
        return {"model": self.digest, **loading, "rank": self.rank, "seed": self.seed, "max_length": self.max_length}


class TuningUtility:
    """v(S): tune for a fixed number of steps on the rows of the players in S, then score a development set.

    The model stays resident and its trained weights are put back bit by bit, so every evaluation
    begins alike. The order of the rows and the development set are the same in all of them
    (common random numbers): a difference of two values is a difference of rows. A repeated
    evaluation draws another order. Where the steps do not reach all rows of S, those that are
    used are a sample drawn for S, so that no player is left out of every large coalition. On a
    CPU an evaluation uses one thread, so that its bits do not depend on how many run side by side.

    It can be sent to other processes, each of which then loads the model for itself.

    Parameters
    ----------
    model : TunableModel
        What is tuned.
    players : sequence of sequence of Row
        Rows of every player.
    dev : sequence of Row
        The development set.
    steps, batch_size : int
        Of every tuning; the rows are gone through again as often as it takes.
    lr : float
        Learning rate of AdamW, falling linearly to zero.
    score : {"loss", "accuracy"}
        Negative loss per token over the development set, or the share of multiple-choice rows
        whose likeliest choice is right.
    seed : int
        Of the order.
    """

    def __init__(
        self, model: TunableModel, players: Sequence[Sequence[Row]], dev: Sequence[Row], *,
        steps: int, batch_size: int, lr: float, score: Literal["loss", "accuracy"], seed: int,
    ) -> None:  # fmt: skip
        self.model = model
        self.players = players
        self.dev = dev
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.score = score
        self.seed = seed
        self.fingerprint = self._digest()
        self._held: tuple[Scorer, dict[str, torch.Tensor], list[list[tuple[str, Encoded]]]] | None = None

    def __call__(self, coalition: frozenset[int]) -> float:
        """Value of a set of players; of none, the score of the model as it is."""
        return self.evaluate(coalition, 0)

    def evaluate(self, coalition: frozenset[int], repeat: int) -> float:
        """The same, with the order of rows that the `repeat`-th evaluation draws."""
        with one_thread(self._open()[0].model.device):
            return self._measure(self.tuned(coalition, repeat))

    def tuned(self, coalition: frozenset[int], repeat: int = 0) -> Scorer:
        """The model after the tuning; the next one changes it."""
        scorer, start, encoded = self._open()
        with one_thread(scorer.model.device):
            restore_trainable(scorer.model, start)
            rows = [pair for p in sorted(coalition) for pair in encoded[p]]
            if rows:
                self._tune(scorer, self._ordered(rows, coalition, repeat))
        return scorer

    def _ordered(self, rows: Sequence[tuple[str, Encoded]], coalition: frozenset[int], repeat: int) -> list[Encoded]:
        """Rows in the order that their ids draw; where not all are reached, in an order of the coalition's own."""
        reached = self.steps * self.batch_size >= len(rows)
        own = "" if reached else f"/{hashlib.sha256(repr(sorted(coalition)).encode()).hexdigest()}"
        draws = keyed_uniform(self.seed, f"utility/order/{repeat}{own}", [name for name, _ in rows])
        return [rows[i][1] for i in sorted(range(len(rows)), key=lambda i: (draws[i], rows[i][0], i))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def _open(self) -> tuple[Scorer, dict[str, torch.Tensor], list[list[tuple[str, Encoded]]]]:
        if self._held is None:
            scorer = self.model.open()
            encoded = [[(row.id, e) for row in rows if (e := trainable(scorer.encoder, row))] for rows in self.players]
            self._held = scorer, trainable_state(scorer.model), encoded
        return self._held

    def _tune(self, scorer: Scorer, rows: Sequence[Encoded]) -> None:
        optimizer = build_optimizer(scorer.model, AdamWConfig(), self.lr)
        schedule = build_schedule(optimizer, "linear", self.steps, 0.0)
        wanted = self.steps * self.batch_size
        order = [rows[i % len(rows)] for i in range(wanted)]
        batches = [[order[s : s + self.batch_size]] for s in range(0, wanted, self.batch_size)]
        local_steps(scorer.model, batches, optimizer, schedule)

    def _measure(self, scorer: Scorer) -> float:
        if self.score == "accuracy":
            right = [c.best(per_char=True) == row.answer for row, c in scorer.choices(self.dev)]
            return sum(right) / len(right)
        losses = [loss for _, loss in scorer.losses(self.dev)]
        scorer.unscored.clear()  # the same rows every time
        return -sum(x.loss_sum for x in losses) / sum(x.tokens for x in losses)

    def _digest(self) -> str:
        settings = {
            "version": VERSION, **self.model.describe(), "steps": self.steps, "rows_per_step": self.batch_size,
            "lr": self.lr, "score": self.score, "order": self.seed,
            "ids": [[row.id for row in rows] for rows in self.players],
            "players": [[content_digest(row).hex() for row in rows] for rows in self.players],
            "dev": [content_digest(row).hex() for row in self.dev],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def trainable(encoder: Encoder, row: Row) -> Encoded | None:
    """A row as tokens, or None where nothing of it can be trained on."""
    try:
        encoded = encoder.encode_choices(row)[row.answer] if row.kind == "choice" else encoder.encode(row)
    except UnrenderableRow:
        return None
    return encoded if encoded.targets else None
