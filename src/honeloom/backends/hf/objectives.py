"""What zeroth-order steps compare: losses, or shares of tokens or rows that are wrong; on one side, or both at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Objective", "SidedObjective", "objective_of"]

CHUNK = 1 << 20
"""Logits that are read at a time."""
Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs of a forward pass, and where its targets are among the logits that it returns, row after row."""

    inputs: dict[str, Any]
    places: torch.Tensor | None
    """Indices into (rows x positions); None where every one of them has a target."""
    rows: npt.NDArray[np.int64]
    ids: torch.Tensor

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.inputs["input_ids"])


def objective_of(
    model: Any, batches: Sequence[Values], targets: int, objective: str, *, rows: bool = False,
    sides: Mapping[str, torch.nn.Module] | None = None,
) -> Objective | SidedObjective:  # fmt: skip
    """What two sides are compared by: nats per target token, or the share of tokens, or of rows, that are wrong.

    Logits are computed where any row of the batch has a target, if the model can be asked for that, and read a few at
    a time in float32, with sums in float64, so that there is never a second copy of them.

    Parameters
    ----------
    model : transformers or PEFT model
        In evaluation mode: both sides must see the same network.
    batches : sequence of mapping
        Inputs of the forward passes, with labels.
    targets : int
        Target tokens in all of them.
    objective : {"loss", "accuracy", "exact_match"}
        Which. A token is wrong if it is not the likeliest one after the true tokens before it, a row if any of its
        targets is.
    rows : bool
        Whether to return each row's mean over its own targets instead, for steps that bound what a row can do.
    sides : mapping, optional
        Linear layers by the names of their weights, which are all that is moved: losses on both sides then take one
        forward pass of twice the rows.

    Returns
    -------
    callable
        Gives a number, or numbers of shape (rows,) in float64; 0 for a row without targets.

    Raises
    ------
    ValueError
        Rows are asked for where several are packed into one.
    """
    packed = any("position_ids" in inputs for inputs in batches)
    if packed and (rows or objective == "exact_match"):
        raise ValueError("packed batches have no rows of their own; use padded ones")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = _arguments(getattr(base.forward, "__func__", base.forward))
    ready = [_prepared(inputs, "use_cache" in known, "logits_to_keep" in known) for inputs in batches]
    one = Objective(model, ready, targets, objective, rows)
    return one if sides is None else SidedObjective(one, sides)


class Objective:
    """The number at the weights as they are; see `objective_of`."""

    def __init__(self, model: Any, batches: Sequence[_Batch], targets: int, objective: str, rows: bool) -> None:
        self.model, self.batches, self.targets, self.objective, self.rows = model, batches, targets, objective, rows

    def __call__(self) -> Any:
        """A number, or one for each row."""
        with torch.inference_mode():  # with no_grad, autocast would go on with its casts of weights from before a move
            found = [_each(self.model(**batch.inputs).logits, batch, self.objective) for batch in self.batches]
        return self.summed(found)

    def summed(self, each: Sequence[torch.Tensor]) -> Any:
        """Of every batch's targets, what is returned."""
        pairs = list(zip(self.batches, each, strict=True))
        if self.objective == "exact_match":
            wrong = np.concatenate([_by_row(batch, values) > 0 for batch, values in pairs])
            return wrong.astype(np.float64) if self.rows else float(wrong.mean())
        if self.rows:
            return np.concatenate([_by_row(batch, values) for batch, values in pairs])
        return sum(float(values.sum()) for _, values in pairs) / self.targets


class SidedObjective:
    """The same, and on both sides at once; for steps that keep directions."""

    def __init__(self, one: Objective, sides: Mapping[str, torch.nn.Module]) -> None:
        self.one, self.sides = one, sides

    def __call__(self) -> Any:
        """At the weights as they are."""
        return self.one()

    def both(self, plus: Values, minus: Values) -> tuple[Any, Any]:
        """At two sets of weights: the first half of the rows sees one of them, the second the other.

        Layers that do not see the rows as such (experts) take two passes.
        """
        first, second = [], []
        try:
            with torch.inference_mode(), _forward(self.sides, partial(_halves, plus, minus)):
                for batch in self.one.batches:
                    logits = self.one.model(**_twice(batch.inputs)).logits
                    first.append(_each(logits[: batch.count], batch, self.one.objective))
                    second.append(_each(logits[batch.count :], batch, self.one.objective))
            return self.one.summed(first), self.one.summed(second)
        except _NotRowsError:
            found = []
            for values in (plus, minus):
                with _forward(self.sides, partial(_whole, values)):
                    found.append(self.one())
            return found[0], found[1]


class _NotRowsError(Exception):
    """A layer's input has no dimension of rows."""


@contextmanager
def _forward(sides: Mapping[str, torch.nn.Module], how: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let layers compute in another way for a while."""
    for name, module in sides.items():
        module.forward = partial(how, name)
    try:
        yield
    finally:
        for module in sides.values():
            del module.forward  # the class's own is left


def _halves(plus: Values, minus: Values, name: str, x: torch.Tensor) -> torch.Tensor:
    if x.ndim != 3 or len(x) % 2:
        raise _NotRowsError
    half = len(x) // 2
    linear = torch.nn.functional.linear
    return torch.cat([linear(x[:half], plus[name]), linear(x[half:], minus[name])])


def _whole(values: Values, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, values[name])


def _twice(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Every row two times; places of logits are those of all rows."""
    same = ("use_cache", "logits_to_keep")
    return {k: v if k in same else v.repeat(2, *[1] * (v.ndim - 1)) for k, v in inputs.items()}


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of what a forward pass can be told; asking takes longer than a small step's noise."""
    return frozenset(inspect.signature(forward).parameters)


def _prepared(inputs: Values, uncached: bool, lean: bool) -> _Batch:
    """What does not change from side to side; in numpy, whose calls cost less than a small model's layers."""
    device = inputs["labels"].device
    labels = inputs["labels"].cpu().numpy()[:, 1:]
    scored = labels != -100
    asked: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    if uncached:
        asked["use_cache"] = False
    positions = labels.shape[1] + 1
    if lean:
        keep = np.flatnonzero(scored.any(axis=0))
        asked["logits_to_keep"] = torch.from_numpy(keep).to(device)
        labels, scored, positions = labels[:, keep], scored[:, keep], len(keep)
    row, place = scored.nonzero()
    places = None if len(row) == len(labels) * positions else torch.from_numpy(row * positions + place).to(device)
    return _Batch(asked, places, row, torch.from_numpy(labels[row, place]).to(device))


def _each(logits: torch.Tensor, batch: _Batch, objective: str) -> torch.Tensor:
    """Of every target, its nats or whether it is not the likeliest; float64."""
    logits = logits.flatten(0, 1)
    found = torch.empty(len(batch.ids), dtype=torch.float64, device=logits.device)
    size = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(batch.ids), size):
        end = min(start + size, len(batch.ids))
        part = logits[start:end] if batch.places is None else logits[batch.places[start:end]]
        ids = batch.ids[start:end]
        if objective == "loss":
            found[start:end] = torch.nn.functional.cross_entropy(part.float(), ids, reduction="none")
        else:
            found[start:end] = part.argmax(dim=-1) != ids
    return found


def _by_row(batch: _Batch, each: torch.Tensor) -> npt.NDArray[np.float64]:
    totals = np.bincount(batch.rows, each.cpu().numpy(), batch.count)
    return np.asarray(totals / np.bincount(batch.rows, minlength=batch.count).clip(min=1))
