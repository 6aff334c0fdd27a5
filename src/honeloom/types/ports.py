"""Narrow protocols: what methods may ask of rows and models. `backends/hf` implements them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError
from honeloom.types.rows import Row

__all__ = [
    "CandidatePort", "EmbedPort", "GeneratePort", "GradientPort", "LossPort", "RowLossLike", "RowTable",
    "SelectionData", "UtilityPort",
]  # fmt: skip

Vectors = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]


class RowLossLike(Protocol):
    """Loss of one row: summed nats, the number of scored tokens, and whether the row was cut."""

    @property
    def loss_sum(self) -> float:
        """Summed loss in nats."""

    @property
    def tokens(self) -> int:
        """Scored tokens."""

    @property
    def truncated(self) -> bool:
        """Whether the row was cut at the model's limit."""


class LossPort(Protocol):
    """A model that can score rows and count tokens."""

    def losses(self, rows: Iterable[Row], *, with_prompt: bool = True) -> Iterator[tuple[Row, RowLossLike]]:
        """Yield rows with the loss of their response, given the prompt or without it."""

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text."""


class RowTable(Protocol):
    """Rows that can be iterated again and again, with their labels at hand."""

    @property
    def ids(self) -> Sequence[str]:
        """Id of every row."""

    @property
    def domains(self) -> Sequence[str | None]:
        """Domain label of every row."""

    @property
    def sources(self) -> Sequence[str]:
        """Source of every row."""

    def __len__(self) -> int:
        """Number of rows."""

    def __iter__(self) -> Iterator[Row]:
        """Stream the rows."""


class EmbedPort(Protocol):
    """Turns rows into vectors."""

    def __call__(self, rows: RowTable, how: Any) -> Vectors:
        """Vectors (N, d) of length 1, maybe a memory map; a row that has none is zero. `how` is an `Embedding`."""


class GeneratePort(Protocol):
    """A model that writes text."""

    def generate(
        self, prompts: Sequence[str], *, seed: int, max_new_tokens: int, temperature: float, top_p: float
    ) -> list[str]:
        """One continuation per prompt, as an answer to it; equal prompts are answered differently.

        What is drawn follows from the seed and the prompt's place, not from how prompts are
        batched. A prompt that leaves the model no room is answered by nothing.
        """

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Mean input embedding of every text's tokens, (n, d); zeros for a text without tokens."""


class GradientPort(Protocol):
    """A model with small trainable adapters, and what its loss would have every row change in them.

    The loss of a row is its mean per scored token. Rows without a scored token give NaN.
    """

    def reset(self) -> None:
        """Put the adapters back where they began, bit for bit; the optimizer and what is aimed at are forgotten."""

    def aim(self, target: Sequence[Row]) -> None:
        """Hold the mean gradient of these rows at the present weights, for `train` and `alignments`."""

    def train(self, rows: Sequence[Row], *, lr: float) -> Values:
        """One optimizer step on the mean loss of these rows.

        Returns, (n,), by how many nats the step lowers what is aimed at on account of every row,
        to first order; zeros where nothing is aimed at.
        """

    def alignments(self, rows: Sequence[Row]) -> Values:
        """Inner products (n,) of the rows' gradients with what is aimed at, at the present weights."""

    def sketches(self, rows: Sequence[Row], *, size: int, seed: int, as_adam: bool = False) -> Vectors:
        """Random projections (n, size) of the rows' gradients, or of the steps Adam would take with them.

        Inner products are kept in expectation over `seed`.
        """


class UtilityPort(Protocol):
    """What a set of players is worth as training rows.

    `fingerprint` stands for everything the numbers depend on.
    """

    fingerprint: str

    def __call__(self, coalition: frozenset[int]) -> float:
        """Value of a set of players."""

    def evaluate(self, coalition: frozenset[int], repeat: int) -> float:
        """The same, with the random numbers of the `repeat`-th time (from 0)."""


class CandidatePort(Protocol):
    """Merges of some models, measured row by row. A candidate is a `Candidate` of merging.search.

    A row's value is summed over what is scored of it, and lower is better; its weight, what the value is divided by
    (characters, tokens or 1), is the same for every candidate.
    """

    @property
    def models(self) -> Sequence[str]:
        """Names of the N models."""

    @property
    def groups(self) -> int:
        """Rows G of a candidate's weights (G, N)."""

    def single(self, model: int, rows: Sequence[int]) -> Values:
        """Value and weight of some rows under one model as it is, (n, 2)."""

    def measure(self, candidate: Any, rows: Sequence[int]) -> Values:
        """Value and weight of some rows under a candidate, (n, 2)."""

    def gradient(self, candidate: Any, rows: Sequence[int], factors: Values) -> tuple[Values, Values]:
        """Value and weight of some rows, and the gradient (G, N) of the sum of factor (n,) times value.

        The gradient is that in the candidate's weights.
        """


def _no_model(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError("the method asks for vectors, gradients or tunings, and no model was given (--model)")


def _not_written(name: str) -> AbstractContextManager[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    return nullcontext(([], lambda record: None))


def _nothing_kept(fingerprint: str, budget: int) -> AbstractContextManager[tuple[Any, Any]]:
    return nullcontext((None, None))


def _silent(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class SelectionData:
    """What a selector works on.

    Attributes
    ----------
    rows : RowTable
        The usable rows.
    open_model : callable
        Returns the model's port, loading it on first use; raises if no model was given.
    seed : int
        For methods that draw.
    target : RowTable or None
        Rows of what the model is wanted for.
    budget : int or None
        Most evaluations of a utility; None leaves it to the method.
    wanted : int or None
        How many rows will be kept, where that is known: a method may stop ordering rows there.
    embed : EmbedPort
        Turns rows into vectors.
    tuned : callable
        (rows, `RoundTuning`) -> EmbedPort of the model after a tuning on those rows.
    open_gradients : callable
        (rank) -> GradientPort, on LoRA adapters of that rank drawn from the seed.
    open_utility : callable
        (players, target rows, `UtilityConfig`) -> UtilityPort: tune on the players' rows, score the
        target.
    open_evaluations : callable
        (fingerprint, budget) -> context of a `Ledger` and an `Executor`; both None: nothing is
        kept, and this process evaluates.
    open_generator : callable
        Returns a GeneratePort; raises if no model was given.
    open_journal : callable
        (file name) -> context of the records that an interrupted attempt left, and a callable
        that adds one to the output. By default nothing is kept.
    say, warn : callable
        Told what a person may want to know, and must know.
    """

    rows: RowTable
    open_model: Callable[[], LossPort]
    seed: int
    target: RowTable | None = None
    budget: int | None = None
    wanted: int | None = None
    embed: EmbedPort = _no_model
    tuned: Callable[[Sequence[Row], Any], EmbedPort] = _no_model
    open_gradients: Callable[[int], GradientPort] = _no_model
    open_utility: Callable[..., UtilityPort] = _no_model
    open_evaluations: Callable[[str, int], AbstractContextManager[tuple[Any, Any]]] = _nothing_kept
    open_generator: Callable[[], GeneratePort] = _no_model
    open_journal: Callable[
        [str], AbstractContextManager[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]
    ] = _not_written
    say: Callable[[str], None] = _silent
    warn: Callable[[str], None] = _silent
