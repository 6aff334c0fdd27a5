"""Fakes of the narrow ports: rows in memory, and a model whose losses are given."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from honeloom.types.rows import Row, Turn, Where

__all__ = ["FakeGradients", "FakeLoss", "FakeModel", "FakeRows", "FakeUtility", "chat_row"]


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


class FakeGradients:
    """A GradientPort of a linear regression: the loss of a row (x, y) is (w x - y)^2 / 2, and steps are plain SGD.

    Parameters
    ----------
    point : callable
        Row -> (x, y) with x of shape (d,); None means that the row has no scored token.
    start : array of shape (d,)
        The weights w before any step.
    """

    def __init__(self, point: Callable[[Row], tuple[npt.ArrayLike, float] | None], start: npt.ArrayLike) -> None:
        self._point = point
        self._start = np.asarray(start, dtype=np.float64)
        self.reset()

    def reset(self) -> None:
        """Put the weights back."""
        self.weights = self._start.copy()
        self._direction = np.zeros_like(self.weights)

    def gradients(self, rows: Iterable[Row]) -> npt.NDArray[np.float64]:
        """Gradients (n, d) at the present weights; NaN for rows without a scored token."""
        found = []
        for row in rows:
            point = self._point(row)
            x, y = (
                (np.asarray(point[0], dtype=np.float64), point[1])
                if point
                else (np.full_like(self.weights, np.nan), 0.0)
            )
            found.append((x @ self.weights - y) * x)
        return np.array(found)

    def aim(self, target: Sequence[Row]) -> None:
        """Hold the target's mean gradient."""
        self._direction = np.nanmean(self.gradients(target), axis=0)

    def train(self, rows: Sequence[Row], *, lr: float) -> npt.NDArray[np.float64]:
        """One step of SGD; what it lowers the target's loss by, by row."""
        gradients = self.gradients(rows)
        known = np.isfinite(gradients).all(axis=1)
        if known.any():
            self.weights = self.weights - lr * gradients[known].mean(axis=0)
        owed: npt.NDArray[np.float64] = lr / max(1, int(known.sum())) * (gradients @ self._direction)
        return owed

    def alignments(self, rows: Sequence[Row]) -> npt.NDArray[np.float64]:
        """Inner products of the rows' gradients with the target's."""
        products: npt.NDArray[np.float64] = self.gradients(rows) @ self._direction
        return products

    def sketches(self, rows: Sequence[Row], *, size: int, seed: int, as_adam: bool = False) -> npt.NDArray[np.float32]:
        """The gradients themselves and zeros, (n, size); `as_adam` gives their signs, Adam's first step."""
        gradients = self.gradients(rows)
        found = np.zeros((len(gradients), size), dtype=np.float32)
        found[:, : gradients.shape[1]] = np.sign(gradients) if as_adam else gradients
        return found


class FakeUtility:
    """A UtilityPort: an additive game in which a row is worth what `worth` says.

    Parameters
    ----------
    players : sequence of sequence of Row
        Rows of every player.
    worth : callable
        Row -> its part of the value.
    empty : float
        Value of no rows.
    """

    fingerprint = "fake"

    def __init__(self, players: Sequence[Sequence[Row]], worth: Callable[[Row], float], empty: float = 0.0) -> None:
        self.values = [sum(worth(row) for row in rows) for rows in players]
        self.empty = empty
        self.calls = 0

    def __call__(self, coalition: frozenset[int]) -> float:
        """Value of a set of players."""
        return self.evaluate(coalition, 0)

    def evaluate(self, coalition: frozenset[int], repeat: int) -> float:
        """The same, however often it is asked for."""
        self.calls += 1
        return self.empty + sum(self.values[i] for i in sorted(coalition))
