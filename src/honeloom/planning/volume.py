"""How much work a stage is: passes of rows through a model, with and without gradients, before any of it is done.

Pure arithmetic on numbers of rows and tokens; `stages.volumes` reads them and knows the verbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = ["Lengths", "Part", "backward", "batch_sizes", "greedy_losses", "score", "totals", "train"]

QUANTILES = 64
"""Lengths that are kept of the rows that were looked at, evenly spaced in their order."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Rows and their tokens.

    Attributes
    ----------
    rows : int
        How many there are.
    tokens, targets, scored : float
        Means per row: of the row as it is trained on, of its answer, and of what a scoring pass computes, which are
        all choices of a question.
    sequences : float
        Mean number of sequences that scoring computes per row: the choices of a question, else 1.
    sizes, scored_sizes : tuple of int
        Tokens of sequences that are trained on, and scored: quantiles, ascending, the longest last.
    counted : bool
        Whether every row was looked at.
    """

    rows: int
    tokens: float = 0.0
    targets: float = 0.0
    scored: float = 0.0
    sequences: float = 1.0
    sizes: tuple[int, ...] = ()
    scored_sizes: tuple[int, ...] = ()
    counted: bool = False

    @classmethod
    def of(
        cls, rows: int, tokens: Sequence[int], targets: Sequence[int], scored: Sequence[Sequence[int]], *, counted: bool
    ) -> Lengths:
        """From rows that were looked at, which may be fewer than `rows`."""
        looked, sequences = max(1, len(tokens)), [length for choices in scored for length in choices]
        return cls(
            rows, sum(tokens) / looked, sum(targets) / looked, sum(sequences) / looked,
            len(sequences) / looked if sequences else 1.0, _quantiles(tokens), _quantiles(sequences), counted,
        )  # fmt: skip

    def take(self, rows: int) -> Lengths:
        """As many rows of the same kind."""
        return self if rows == self.rows else replace(self, rows=max(0, rows), counted=False)

    def answers(self) -> Lengths:
        """The same rows with empty prompts."""
        mean = min(self.scored, self.targets + 1)
        share = mean / self.scored if self.scored else 1.0
        sizes = tuple(max(1, round(n * share)) for n in self.scored_sizes)
        return replace(self, scored=mean, scored_sizes=sizes, counted=False)

    @property
    def total(self) -> int:
        """Tokens of all rows, each once."""
        return round(self.rows * self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that was looked at."""
        return max([*self.sizes[-1:], *self.scored_sizes[-1:]], default=0)


def _quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
    ordered = sorted(lengths)
    if len(ordered) <= QUANTILES:
        return tuple(ordered)
    return tuple(ordered[round(k * (len(ordered) - 1) / (QUANTILES - 1))] for k in range(QUANTILES))


@dataclass(frozen=True, slots=True)
class Part:
    """Passes of one kind.

    Attributes
    ----------
    what : str
        For people.
    kind : {"score", "train", "backward"}
        Without gradients; optimizer steps; gradients without a step.
    lengths : Lengths
        Of the rows that pass.
    passes : float
        How often a row of them passes, on average; of `train`, rows of all steps over rows.
    batch : int
        Rows per forward pass.
    steps : int
        Optimizer steps.
    depth : float
        Share of the layers that are computed.
    rendered : int
        Rows that are made to tokens for it.
    tuning : mapping
        Of `train` and `backward`: settings as `tune` has them; of `score` those of adapters that the model has.
    model : str
        Place of the model among the stage's inputs.
    loop : {"trainer", "local"}
        Of `train`: the trainer of `tune`, or the small loop of utilities and clients.
    alone : bool
        Whether it computes with one thread on a CPU, whatever the machine has.
    """

    what: str
    kind: Literal["score", "train", "backward"]
    lengths: Lengths
    passes: float
    batch: int
    steps: int = 0
    depth: float = 1.0
    rendered: int = 0
    tuning: Mapping[str, Any] = field(default_factory=dict)
    model: str = "model"
    loop: Literal["trainer", "local"] = "local"
    alone: bool = False

    @property
    def tokens(self) -> int:
        """Of all passes."""
        mean = self.lengths.scored if self.kind == "score" else self.lengths.tokens
        return round(self.passes * self.lengths.rows * mean)

    @property
    def directions(self) -> int:
        """Of zeroth-order steps, each of which costs two passes; 0 where there are gradients."""
        optimizer = self.tuning.get("optimizer") or {}
        return int(optimizer.get("directions", 1)) if optimizer.get("type") == "mezo" else 0


def score(
    what: str, lengths: Lengths, *, batch: int, times: float = 1.0, depth: float = 1.0, rendered: int | None = None,
    model: str = "model", alone: bool = False, rank: int = 0,
) -> Part:  # fmt: skip
    """Rows scored `times` times; they are made to tokens every time unless `rendered` says how many are.

    `rank` is that of adapters which the model has beside its own weights.
    """
    tuning = {"method": {"type": "lora", "rank": rank}} if rank else {}
    drawn = round(lengths.rows * times) if rendered is None else rendered
    return Part(
        what, "score", lengths, times, batch, depth=depth, rendered=drawn, tuning=tuning, model=model, alone=alone
    )


def train(
    what: str, lengths: Lengths, *, steps: int, batch: int, rows: int | None = None, rendered: int | None = None,
    tuning: Mapping[str, Any] | None = None, loop: Literal["trainer", "local"] = "local", alone: bool = False,
) -> Part:  # fmt: skip
    """Optimizer steps; `rows` pass in all, by default `batch` in every step."""
    passed = steps * batch if rows is None else rows
    drawn = lengths.rows if rendered is None else rendered
    return Part(
        what, "train", lengths, passed / max(1, lengths.rows), batch, steps=steps, rendered=drawn,
        tuning={"batch_size": batch, **(tuning or {})}, loop=loop, alone=alone,
    )  # fmt: skip


def backward(
    what: str, lengths: Lengths, *, batch: int, times: float = 1.0, tuning: Mapping[str, Any] | None = None,
    model: str = "model",
) -> Part:  # fmt: skip
    """Gradients of rows without a step."""
    settings = {"batch_size": batch, **(tuning or {})}
    drawn = round(lengths.rows * times)
    return Part(what, "backward", lengths, times, batch, rendered=drawn, tuning=settings, model=model)


def batch_sizes(part: Part, most: int) -> list[list[int]]:
    """Lengths of the rows of some batches of a scoring pass, in which rows of similar length go together.

    Parameters
    ----------
    part : Part
        The pass.
    most : int
        Batches at most; of more, evenly spaced ones.
    """
    sizes = part.lengths.scored_sizes
    batches = max(1, round(part.lengths.rows * part.lengths.sequences / part.batch))
    chosen = sorted({(2 * k + 1) * batches // (2 * most) for k in range(most)}) if batches > most else range(batches)
    places = [[(j + (i + 0.5) / part.batch) / batches for i in range(part.batch)] for j in chosen]
    return [[sizes[min(len(sizes) - 1, int(place * len(sizes)))] for place in batch] for batch in places]


def greedy_losses(units: int, drops: int) -> int:
    """Losses that a greedy choice of `drops` out of `units` measures: of all that are left, each time, and the first.

    Parameters
    ----------
    units, drops : int
        Numbers of what may go, and of what goes.
    """
    return 1 + sum(units - gone for gone in range(min(units, drops)))


def totals(parts: Sequence[Part]) -> tuple[int, int, int]:
    """Tokens without gradients, tokens with them, and steps of all parts; a zeroth-order step is forward passes."""
    forward = sum(max(1, 2 * p.directions) * p.tokens for p in parts if p.kind == "score" or p.directions)
    gradients = sum(p.tokens for p in parts if p.kind != "score" and not p.directions)
    return forward, gradients, sum(p.steps for p in parts)
