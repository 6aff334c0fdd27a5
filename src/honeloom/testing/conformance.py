"""One suite per kind of method; built-in methods and plug-ins pass the same one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from honeloom.selection.choose import take_best
from honeloom.testing.fakes import FakeModel, FakeRows, chat_row
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData
from honeloom.types.rows import Row

__all__ = ["check_drop_metric", "check_merge_method", "check_selector"]


def _rows(count: int) -> list[Row]:
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    return [
        chat_row(f"row-{i}", " ".join(words[: i % 5 + 1]), " ".join(words[: (i * 3) % 7 + 1]), domain="ab"[i % 2])
        for i in range(count)
    ]


def _word_loss(row: Row, with_prompt: bool) -> float | None:
    if row.id.endswith("-7"):
        return None
    return 1.0 + (len(row.prompt) % 11) / 10 - (0.3 if with_prompt else 0.0)


def check_selector(method: Callable[..., Scores], **settings: Any) -> None:
    """Require what every selector promises.

    One number per row and no NaN; the same scores when called again; scores that follow the
    row, not its place: reordering the rows reorders the scores; and rows that cannot be scored
    are -inf, so that they are chosen last whichever end is the better one.

    Raises
    ------
    AssertionError
        What does not hold.
    """
    rows = _rows(24)

    def score(order: Sequence[Row]) -> Scores:
        return method(SelectionData(FakeRows(order), lambda: FakeModel(_word_loss), seed=3), **settings)

    first = score(rows)
    assert len(first) == len(rows), f"{len(first)} scores for {len(rows)} rows"
    assert not any(math.isnan(v) for v in first.value), "a score is NaN; rows that cannot be scored must be -inf"
    assert all(math.isfinite(v) or v == -math.inf for v in first.value), "a score is +inf; an unknown one is -inf"
    assert score(rows).value == first.value, "a second call gives other scores"
    for name, column in (first.columns or {}).items():
        assert len(column) == len(rows), f"column {name!r} has {len(column)} entries for {len(rows)} rows"
    backwards = score(rows[::-1])
    kept = [_chosen(s, order, 8) for s, order in ((first, rows), (backwards, rows[::-1]))]
    distinct = len(set(first.value)) == len(rows)
    assert not distinct or kept[0] == kept[1], "the choice depends on the order of the rows"
    unknown = {row.id for row, v in zip(rows, first.value, strict=True) if v == -math.inf}
    known = len(rows) - len(unknown)
    assert not unknown & _chosen(first, rows, known), "a row that cannot be scored is chosen before one that can"


def _chosen(scores: Scores, rows: Sequence[Row], count: int) -> set[str]:
    ids = [row.id for row in rows]
    return {ids[i] for i in take_best(scores, ids, amount=count, unit="rows", seed=0).keep}


def check_merge_method(
    method: Callable[..., torch.Tensor], *, needs_base: bool, models: int = 3, **settings: Any
) -> None:
    """Require what every merge rule on flat tensors promises.

    Shape and float64 result, finite, inputs unchanged, the same bits when called again, and
    merging a model with copies of itself gives that model.

    Parameters
    ----------
    method : callable
        (tensors, weights) or, with a base, (base, tensors, weights).
    needs_base : bool
        Whether the first argument is the base.
    models : int
        How many tensors to merge.

    Raises
    ------
    AssertionError
        What does not hold.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(257, generator=generator) for _ in range(models)]
    base = torch.randn(257, generator=generator)
    copies = [t.clone() for t in tensors]
    weights = [1.0 / models] * models

    def merge(given: Sequence[torch.Tensor]) -> torch.Tensor:
        return method(base, given, weights, **settings) if needs_base else method(given, weights, **settings)

    merged = merge(tensors)
    assert merged.shape == base.shape, f"shape {tuple(merged.shape)}, expected {tuple(base.shape)}"
    assert bool(torch.isfinite(merged).all()), "the result is not finite"
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True)), "an input was changed"
    assert torch.equal(merge(tensors), merged), "a second call gives other bits"
    same = merge([tensors[0]] * models)
    assert torch.allclose(same.float(), tensors[0], atol=1e-6), "merging copies of one model does not give that model"


def check_drop_metric(metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Require what every streaming drop metric promises.

    One finite float32 number per token, at least 0; 0 where the stream does not change;
    the same for every batch shape; inputs unchanged.

    Raises
    ------
    AssertionError
        What does not hold.
    """
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3, 5, 16, generator=generator)
    after = before + 0.1 * torch.randn(3, 5, 16, generator=generator)
    copy = before.clone()
    values = metric(before, after)
    assert values.shape == (3, 5), f"shape {tuple(values.shape)}, expected one number per token (3, 5)"
    assert bool(torch.isfinite(values).all()) and float(values.min()) >= 0, "an importance is negative or not finite"
    assert float(metric(before, before).abs().max()) == 0.0, "an unchanged stream has importance"
    assert torch.allclose(metric(before[:1], after[:1]), values[:1], atol=1e-7), "the batch changes a value"
    assert torch.equal(before, copy), "an input was changed"
