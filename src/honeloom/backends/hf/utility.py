"""A tuning as a utility: what a set of rows is worth is the score of the model that was tuned on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import (
    build_optimizer,
    build_schedule,
    local_steps,
    restore_trainable,
    trainable_state,
)
from honeloom.backends.hf.score import Scorer
from honeloom.ops.noise import keyed_uniform
from honeloom.tuning.config import AdamWConfig
from honeloom.types.rows import Row

__all__ = ["TuningUtility"]


class TuningUtility:
    """v(S): tune for a fixed number of steps on the rows of the players in S, then score a development set.

    The model stays resident and its trained weights are put back bit by bit, so every evaluation
    begins alike. The order of the rows and the development set are the same in all of them
    (common random numbers): a difference of two values is a difference of rows.

    Parameters
    ----------
    scorer : Scorer
        Its model has trainable parameters, for example LoRA's.
    players : sequence of sequence of Encoded
        Rows of every player.
    names : sequence of str
        Of the players: the order of rows follows from them and the seed.
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
        self, scorer: Scorer, players: Sequence[Sequence[Encoded]], names: Sequence[str], dev: Sequence[Row], *,
        steps: int, batch_size: int, lr: float, score: Literal["loss", "accuracy"], seed: int,
    ) -> None:  # fmt: skip
        self.scorer = scorer
        self.players = players
        self.dev = dev
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.score = score
        draws = keyed_uniform(seed, "utility/order", names)
        self._place = dict(enumerate(draws.tolist()))
        self._start = trainable_state(scorer.model)

    def __call__(self, players: frozenset[int]) -> float:
        """Value of a set of players; of none, the score of the model as it is."""
        restore_trainable(self.scorer.model, self._start)
        rows = [row for p in sorted(players, key=lambda p: (self._place[p], p)) for row in self.players[p]]
        if rows:
            self._tune(rows)
        return self._measure()

    def _tune(self, rows: Sequence[Encoded]) -> None:
        optimizer = build_optimizer(self.scorer.model, AdamWConfig(), self.lr)
        schedule = build_schedule(optimizer, "linear", self.steps, 0.0)
        wanted = self.steps * self.batch_size
        order = [rows[i % len(rows)] for i in range(wanted)]
        batches = [[order[s : s + self.batch_size]] for s in range(0, wanted, self.batch_size)]
        local_steps(self.scorer.model, batches, optimizer, schedule)

    def _measure(self) -> float:
        if self.score == "accuracy":
            right = [c.best(per_char=True) == row.answer for row, c in self.scorer.choices(self.dev)]
            return sum(right) / len(right)
        losses = [loss for _, loss in self.scorer.losses(self.dev)]
        return -sum(x.loss_sum for x in losses) / sum(x.tokens for x in losses)
