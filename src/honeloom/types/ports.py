"""Narrow protocols: what methods may ask of rows and models. `backends/hf` implements them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from honeloom.types.rows import Row

__all__ = ["LossPort", "RowLossLike", "RowTable", "SelectionData"]


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


class SelectionData:
    """What a selector works on.

    Parameters
    ----------
    rows : RowTable
        The usable rows.
    open_model : callable
        Returns the model's port, loading it on first use; raises if no model was given.
    seed : int
        For methods that draw.
    """

    def __init__(self, rows: RowTable, open_model: Callable[[], LossPort], seed: int) -> None:
        self.rows = rows
        self.open_model = open_model
        self.seed = seed
