"""One suite per kind of method; built-in methods and plug-ins pass the same one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from honeloom.federated.aggregation.exactness import measured_error
from honeloom.federated.aggregation.warm import whole
from honeloom.merging.engine.tensors import Merged, Read, Rule, Tensors
from honeloom.ops.lowrank import relative_error
from honeloom.ops.noise import keyed_uniform, normal
from honeloom.selection.choose import take_best
from honeloom.selection.vectors import unit_blocks
from honeloom.testing.fakes import FakeGradients, FakeModel, FakeRows, FakeUtility, chat_row
from honeloom.types.plans import Scores
from honeloom.types.ports import RowTable, SelectionData, Vectors
from honeloom.types.rows import Row
from honeloom.types.updates import Combined, Part
from honeloom.valuation.executors import Executor, Inline, Outcome, Task, Utility
from honeloom.valuation.game import Estimate, Game
from honeloom.valuation.noise import measure_noise

__all__ = ["check_aggregation", "check_drop_metric", "check_estimator", "check_merge_method", "check_selector"]


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


def _toy_vectors(rows: RowTable, how: Any) -> Vectors:
    """Eight numbers per row that follow from its id; one row has none."""
    vectors = np.stack([keyed_uniform(0, f"toy/{j}", rows.ids) - 0.3 for j in range(8)], axis=1).astype(np.float32)
    vectors[[i for i, name in enumerate(rows.ids) if name.endswith("-7")]] = 0.0
    return next(unit_blocks(vectors, standardise=False))


def _toy_point(row: Row) -> tuple[npt.NDArray[np.float64], float] | None:
    """A row of a linear regression that follows from its id; one row has none."""
    x = np.array([keyed_uniform(0, f"point/{j}", [row.id])[0] - 0.5 for j in range(3)])
    return None if row.id.endswith("-7") else (x, float(x.sum()))


def check_selector(method: Callable[..., Scores], **settings: Any) -> None:
    """Require what every selector promises.

    One number per row and no NaN; the same scores when called again; scores that follow the
    row, not its place: reordering the rows reorders the scores, and the order of taking them
    where the method gives one, which lists every row once; and rows that cannot be scored are
    -inf, so that they are chosen last whichever end is the better one. The method gets a model,
    a target, vectors, gradients and a utility that are made up from the rows; 8 rows are wanted.

    Raises
    ------
    AssertionError
        What does not hold.
    """
    rows, target = _rows(24), [replace(row, id=f"target-{row.id}") for row in _rows(7)[4:]]

    def score(order: Sequence[Row]) -> Scores:
        data = SelectionData(
            FakeRows(order), lambda: FakeModel(_word_loss), seed=3, target=FakeRows(target), wanted=8,
            embed=_toy_vectors, open_gradients=lambda rank: FakeGradients(_toy_point, np.zeros(3)),
            open_utility=lambda players, *_: FakeUtility(players, lambda row: keyed_uniform(0, "worth", [row.id])[0]),
        )  # fmt: skip
        return method(data, **settings)

    first = score(rows)
    assert len(first) == len(rows), f"{len(first)} scores for {len(rows)} rows"
    assert not any(math.isnan(v) for v in first.value), "a score is NaN; rows that cannot be scored must be -inf"
    assert all(math.isfinite(v) or v == -math.inf for v in first.value), "a score is +inf; an unknown one is -inf"
    again = score(rows)
    assert again.value == first.value, "a second call gives other scores"
    assert _listed(again) == _listed(first), "a second call gives another order"
    assert first.order is None or sorted(first.order) == list(range(len(rows))), "the order does not list every row"
    for name, column in (first.columns or {}).items():
        assert len(column) == len(rows), f"column {name!r} has {len(column)} entries for {len(rows)} rows"
    backwards = score(rows[::-1])
    kept = [_chosen(s, order, 8) for s, order in ((first, rows), (backwards, rows[::-1]))]
    settled = len(set(first.value)) == len(rows) or first.order is not None
    assert not settled or kept[0] == kept[1], "the choice depends on the order of the rows"
    unknown = {row.id for row, v in zip(rows, first.value, strict=True) if v == -math.inf}
    known = len(rows) - len(unknown)
    assert not unknown & _chosen(first, rows, known), "a row that cannot be scored is chosen before one that can"


def _listed(scores: Scores) -> list[int] | None:
    return None if scores.order is None else list(scores.order)


def _chosen(scores: Scores, rows: Sequence[Row], count: int) -> set[str]:
    ids = [row.id for row in rows]
    return {ids[i] for i in take_best(scores, ids, amount=count, unit="rows", seed=0).keep}


def check_merge_method(
    method: Callable[..., torch.Tensor], *, needs_base: bool, models: int = 3, copies: bool = True, **settings: Any
) -> None:
    """Require what every merge method promises, for a vector and for a matrix.

    Shape and float64 result, finite, inputs unchanged, the same bits when called again, and merging a model with
    copies of itself gives that model. A `Rule`'s plan gives the same bits in whatever ranges it is asked.

    Parameters
    ----------
    method : callable
        Takes tensors, weights and its settings as keywords, and `base` too if it needs one: a `Rule`, or any function.
    needs_base : bool
        Whether it gets a base.
    models : int
        How many tensors to merge.
    copies : bool
        Whether copies of one model give that model; not so for methods that drop entries.
    **settings
        Of the method.

    Raises
    ------
    AssertionError
        What does not hold.
    """
    for shape in ((257,), (24, 17)):
        base, *tensors = (normal(0, f"merge/{k}", math.prod(shape)).view(shape) for k in range(models + 1))
        before = [t.clone() for t in (base, *tensors)]
        weights = [1.0 / models] * models

        def merge(
            given: Sequence[torch.Tensor], weights: Sequence[float] = weights, base: torch.Tensor = base
        ) -> torch.Tensor:
            return method(given, weights, base=base, **settings) if needs_base else method(given, weights, **settings)

        merged = merge(tensors)
        assert merged.shape == shape, f"shape {tuple(merged.shape)}, expected {shape}"
        assert merged.dtype == torch.float64, f"{merged.dtype}, expected torch.float64; the caller rounds"
        assert bool(torch.isfinite(merged).all()), "the result is not finite"
        kept = all(torch.equal(a, b) for a, b in zip((base, *tensors), before, strict=True))
        assert kept, "an input was changed"
        assert torch.equal(merge(tensors), merged), "a second call gives other bits"
        same = merge([tensors[0]] * models)
        alike = torch.allclose(same.float(), tensors[0], atol=1e-6)
        assert alike or not copies, "merging copies of one model does not give that model"
        if isinstance(method, Rule):
            reads = [_read_of(t) for t in (base, *tensors)]
            group = Tensors("", shape, tuple(reads[1:]), tuple(weights), reads[0] if needs_base else None)
            _check_ranges(method.plan(group, **settings), merged.reshape(-1))


def _read_of(tensor: torch.Tensor) -> Read:
    flat = tensor.reshape(-1).double()
    return lambda start, stop: flat[start:stop]


def _check_ranges(plan: Merged, merged: torch.Tensor) -> None:
    """A plan must not show how it is asked: in pieces of 1 to 50 elements, from the last to the first."""
    ends = [end for end in accumulate([1, 2, 50, 17, 3] * 6, initial=0) if end < len(merged)]
    pieces = [plan(start, stop) for start, stop in reversed(list(pairwise([*ends, len(merged)])))]
    assert torch.equal(torch.cat(pieces[::-1]), merged), "other ranges give other bits"


def check_aggregation(
    method: Callable[..., Combined],
    *,
    exact: bool,
    ranks: Sequence[int] = (4, 2, 1),
    shared: Literal["a", "b"] | None = None,
    **settings: Any,
) -> None:
    """Require what every rule that aggregates low-rank updates promises.

    Factors that fit together, finite, float32 or wider also for narrow inputs; inputs unchanged;
    the same bits when called again; the same update in whatever order the clients come; one client
    alone, and copies of one client, give that client's update (which fails where shares count
    squared); a scale counts as if it were part of B. An exact rule gives the weighted sum, and a
    client without factors adds nothing to it.

    Parameters
    ----------
    method : callable
        Takes parts, and its settings as keywords.
    exact : bool
        Whether the result is the sum of p_k s_k B_k A_k.
    ranks : sequence of int
        Of the clients; equal ones for rules that need that.
    shared : {"a", "b"}, optional
        The factor that all clients have in common, for rules that need one.
    **settings
        Of the rule.

    Raises
    ------
    AssertionError
        What does not hold.
    """
    parts = _random_parts(ranks, shared)
    copies = [(part.b.clone(), part.a.clone()) for part in parts]
    result = method(parts, **settings)
    b, a = whole(result)
    assert b.shape[0] == 12 and a.shape[1] == 9 and b.shape[1] == a.shape[0], f"factors {b.shape} and {a.shape}"
    assert bool(torch.isfinite(b).all() and torch.isfinite(a).all()), "a factor is not finite"
    kept = all(torch.equal(p.b, x) and torch.equal(p.a, y) for p, (x, y) in zip(parts, copies, strict=True))
    assert kept, "an input was changed"
    again = whole(method(parts, **settings))
    assert torch.equal(b, again[0]) and torch.equal(a, again[1]), "a second call gives other bits"
    _require_equal(whole(method(parts[::-1], **settings)), (b, a), "the order of the clients changes the update")
    narrow = [replace(part, b=part.b.bfloat16(), a=part.a.bfloat16()) for part in parts]
    dtypes = {t.dtype for t in whole(method(narrow, **settings))}
    assert dtypes <= {torch.float32, torch.float64}, f"bfloat16 factors give {dtypes}; sums need float32"
    first = parts[0]
    update = first.scale * first.b, first.a
    for alone in ([replace(first, weight=1.0)], [replace(first, weight=w) for w in (0.5, 0.3, 0.2)]):
        _require_equal(whole(method(alone, **settings)), update, f"{len(alone)} times one client is not that client")
    folded = [replace(part, b=part.b * part.scale, scale=1.0) for part in parts]
    if shared != "b":
        _require_equal(whole(method(folded, **settings)), (b, a), "a scale is no factor of B")
    if exact:
        error = measured_error(result, parts)
        assert error <= 1e-6, f"the relative error against the weighted sum is {error}"
        absent = Part(torch.zeros(12, 0), torch.zeros(0, 9), 1.0, 0.5)
        given = [absent, *(replace(part, weight=part.weight / 2) for part in parts)]
        error = measured_error(method(given, **settings), given)
        assert error <= 1e-6, f"with a client without factors the relative error is {error}"


def _random_parts(ranks: Sequence[int], shared: str | None) -> list[Part]:
    """Updates of a (12, 9) weight with unequal shares and scales; a shared A is cut to each rank."""
    total = len(ranks) * (len(ranks) + 1) / 2
    parts = []
    for k, rank in enumerate(ranks):
        b = normal(0, "b" if shared == "b" else f"b{k}", 12 * max(ranks)).view(12, max(ranks))[:, :rank].clone()
        a = normal(0, "a" if shared == "a" else f"a{k}", max(ranks) * 9).view(max(ranks), 9)[:rank].clone()
        parts.append(Part(b, a, (2.0, 1.0, 0.5)[k % 3], (k + 1) / total))
    return parts


def _require_equal(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], what: str) -> None:
    error = relative_error(*one, *other)
    assert error <= 1e-6, f"{what}: relative difference {error}"


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


def check_estimator(
    method: Callable[..., Estimate], *, efficient: bool, surrogate: Sequence[float] | None = None, **settings: Any
) -> None:
    """Require what every estimator of players' values promises.

    For a game of five players without noise, two of them alike and one that adds nothing:
    alike values for the first two and none for the last, within five standard errors; the sum
    v(N) - v(empty) where the method defines that; one finite value and one standard error per player; the same bits
    when called again and when evaluations come back in reverse order; no evaluation beyond the
    budget, and a result for every budget from 1 on; failed evaluations left out; a constant
    added to the utility changes nothing.

    Parameters
    ----------
    method : callable
        Takes a Game and its settings as keywords, and returns an Estimate.
    efficient : bool
        Whether the values sum to v(N) - v(empty).
    surrogate : sequence of float or None
        Five cheap values, for methods that need them.

    Raises
    ------
    AssertionError
        What does not hold.
    """

    def run(budget: int, shift: float = 0.0, executor: Executor | None = None, fail: bool = False) -> Estimate:
        utility = _CountedGame(shift, fail)
        cheap = None if surrogate is None else np.array(surrogate)
        game = Game(utility, 5, budget=budget, seed=3, executor=executor or Inline(), surrogate=cheap)
        measure_noise(game, most=min(4, budget))
        found = method(game, **settings)
        assert utility.calls <= game.spent <= budget, f"{utility.calls} evaluations for a budget of {budget}"
        assert cheap is None or cheap.tolist() == list(surrogate or ()), "the surrogate was changed"
        shapes = {found.value.shape, found.stderr.shape, found.count.shape}
        assert shapes == {(5,)}, f"shapes {shapes} for 5 players"
        assert np.isfinite(found.value).all(), f"values {found.value} at budget {budget}"
        assert (found.stderr >= 0).all(), f"standard errors {found.stderr} at budget {budget}"
        return found

    for budget in range(1, 40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(budget)
            run(budget, fail=True)
    full = run(600)
    limit = 5 * np.hypot(full.stderr[0], full.stderr[1]) + 1e-9
    assert abs(full.value[0] - full.value[1]) <= limit, f"players that are alike get {full.value[:2]}"
    assert abs(full.value[4]) <= 5 * full.stderr[4] + 1e-9, f"a player that adds nothing gets {full.value[4]}"
    gain = _CountedGame(0.0, False)(frozenset(range(5))) - _CountedGame(0.0, False)(frozenset())
    assert not efficient or abs(full.value.sum() - gain) <= 1e-9, f"the sum is {full.value.sum()}, not {gain}"
    assert _same(run(600), full), "a second call gives other bits"
    assert _same(run(600, executor=_Backwards()), full), "the order in which evaluations end changes the values"
    moved = run(600, shift=7.0)
    assert np.allclose(moved.value, full.value, atol=1e-9), "a constant added to the utility changes the values"


class _CountedGame:
    """Players 0 and 1 alike, 4 adding nothing, with interactions; one coalition can be made to fail."""

    def __init__(self, shift: float, fail: bool) -> None:
        self.shift, self.fail, self.calls = shift, fail, 0

    def __call__(self, coalition: frozenset[int]) -> float:
        self.calls += 1
        if self.fail and coalition in ({0, 2}, {1, 2, 3}):
            raise RuntimeError("made to fail")
        weights = sum((0.2, 0.2, 0.5, -0.1, 0.0)[i] for i in sorted(coalition))
        return self.shift + weights + 0.3 * ({0, 1} <= coalition) + 0.1 * ({2, 3} <= coalition)


class _Backwards(Inline):
    """Returns outcomes last first, as a pool may."""

    def map_utilities(self, utility: Utility, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        yield from reversed(list(super().map_utilities(utility, tasks)))


def _same(a: Estimate, b: Estimate) -> bool:
    return all(np.array_equal(x, y) for x, y in ((a.value, b.value), (a.stderr, b.stderr), (a.count, b.count)))
