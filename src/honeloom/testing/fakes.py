"""Fakes of the narrow ports: rows in memory, and a model whose losses are given."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from honeloom.types.rows import Row, Turn, Where

__all__ = ["FakeLoss", "FakeModel", "FakeRows", "chat_row"]


def chat_row(row_id: str, prompt: str, answer: str, *, domain: str | None = None, source: str = "fake") -> Row:
    """One question and its answer as a Row."""
    turns = (Turn("user", prompt), Turn("assistant", answer))
    return Row(row_id, "chat", Where("fake.jsonl", 1), source, domain, turns)


class FakeRows:
    """A RowTable over rows in memory."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)

    @property
    def ids(self) -> Sequence[str]:
        """Id of every row."""
        return [r.id for r in self._rows]

    @property
    def domains(self) -> Sequence[str | None]:
        """Domain of every row."""
        return [r.domain for r in self._rows]

    @property
    def sources(self) -> Sequence[str]:
        """Source of every row."""
        return [r.source for r in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


@dataclass(frozen=True, slots=True)
class FakeLoss:
    """Summed loss over a number of tokens."""

    loss_sum: float
    tokens: int
    truncated: bool = False


class FakeModel:
    """A LossPort: a token is a word, and the loss per token is what `loss` says.

    Parameters
    ----------
    loss : callable
        (row, with_prompt) -> nats per token; None means that the row cannot be scored.
    cut : container of str
        Ids of rows that are too long with their prompt.
    """

    def __init__(self, loss: Callable[[Row, bool], float | None], cut: Container[str] = ()) -> None:
        self._loss = loss
        self._cut = cut

    def count_tokens(self, text: str) -> int:
        """Number of words."""
        return len(text.split())

    def losses(self, rows: Iterable[Row], *, with_prompt: bool = True) -> Iterator[tuple[Row, FakeLoss]]:
        """Yield the rows that can be scored, with their losses."""
        for row in rows:
            value = self._loss(row, with_prompt)
            if value is not None:
                tokens = max(1, self.count_tokens(row.response))
                yield row, FakeLoss(value * tokens, tokens, with_prompt and row.id in self._cut)
