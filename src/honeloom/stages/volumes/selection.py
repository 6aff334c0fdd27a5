"""How much work each selection method is: passes of the rows, tunings, evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from honeloom.data.rowset import RowSet
from honeloom.planning.volume import Lengths, Part, backward, score, train
from honeloom.selection.config import (
    IfdConfig,
    InRunConfig,
    LengthConfig,
    LessConfig,
    PerplexityConfig,
    SelectConfig,
    ShedConfig,
    TracinConfig,
    UtilityConfig,
)
from honeloom.selection.daar_config import BandConfig, DaarConfig
from honeloom.selection.sizes import (
    BAND_REPEATS,
    BAND_ROWS,
    BAND_WIDTH,
    FEWEST_STEPS,
    LABEL_PROXIES,
    MOST_HELD_OUT,
    SHED_BUDGET,
    SURROGATE_EPOCHS,
    player_count,
)

__all__ = ["SelectionWork", "selection_parts"]


@dataclass(slots=True)
class SelectionWork:
    """Parts of a selection, what it evaluates, and how often the model is loaded."""

    parts: list[Part] = field(default_factory=list)
    evaluations: int = 0
    at_most: bool = False
    loads: int = 0
    notes: tuple[str, ...] = ()


def selection_parts(
    config: SelectConfig, rows: Lengths, target: Lengths | None, kept: int, table: RowSet | None
) -> SelectionWork:
    """What a method does.

    Parameters
    ----------
    config : SelectConfig
        Its settings.
    rows, target : Lengths
        Of the rows, and of the target where there is one.
    kept : int
        Rows that will be kept.
    table : RowSet or None
        The rows, for labels that make players.
    """
    method, size, work = config.method, config.batch_size, SelectionWork()
    if isinstance(method, PerplexityConfig | IfdConfig):
        work.parts.append(score("score answers", rows, batch=size))
        if isinstance(method, IfdConfig):
            work.parts.append(score("score answers alone", rows.answers(), batch=size))
        work.loads = 1
    elif isinstance(method, LengthConfig) or config.keep.endswith("tok"):
        work.parts.append(score("count tokens", rows, batch=size, times=0.0, rendered=rows.rows))
        work.loads = 1
    embedding = getattr(method, "embedding", None)
    if embedding is not None and not (isinstance(method, ShedConfig) and method.by != "embedding"):
        _embed(work, rows, embedding, size)
    if isinstance(method, DaarConfig):
        _daar(work, method, rows, kept, size)
    elif isinstance(method, ShedConfig):
        _shed(work, config, method, rows, target, table)
    elif isinstance(method, BandConfig) and method.searches:
        _band(work, config, method, rows, target, kept)
    elif isinstance(method, InRunConfig):
        assert target is not None  # the settings have seen to it
        _in_run(work, rows, target.take(min(method.target_rows, target.rows)), method)
    elif isinstance(method, LessConfig | TracinConfig):
        assert target is not None  # the settings have seen to it
        _warmed(work, rows, target.take(min(method.target_rows, target.rows)), method, size)
    return work


def _embed(work: SelectionWork, rows: Lengths, embedding: Any, size: int) -> None:
    if embedding.type == "hidden":
        work.parts.append(score("embed rows", rows, batch=size, depth=embedding.depth))
        work.loads += 1
    elif embedding.type == "sentence_transformers":
        work.notes += ("what the encoder of sentences takes is not counted",)


def _daar(work: SelectionWork, method: DaarConfig, rows: Lengths, kept: int, size: int) -> None:
    embedding = method.embedding
    depths = [*method.sweep, method.depth] if not method.sweep else list(method.sweep)
    same = embedding.type == "hidden" and embedding.depth in depths and not method.probe_rows
    for depth in depths:
        if not (same and getattr(embedding, "depth", None) == depth):
            work.parts.append(score(f"read states at depth {depth:g}", rows, batch=size, depth=depth))
            work.loads += 1
    work.notes += ("finding domains and fitting the probe are not counted",)
    if method.domains:
        rows_written = method.samples * len(method.domains)
        work.notes += (f"{rows_written} rows that the model writes are predicted, and not counted",)
    for _ in range(method.rounds - 1):
        chosen = rows.take(kept)
        steps = method.tuning.epochs * math.ceil(kept / method.tuning.batch_size)
        work.parts.append(train("tune on the choice", chosen, steps=steps, batch=method.tuning.batch_size,
                                tuning=_lora(method.tuning.rank)))  # fmt: skip
        work.parts.append(score("read states again", rows, batch=size, depth=method.depth))
        work.loads += 1


def _lora(rank: int) -> dict[str, Any]:
    return {"method": {"type": "lora", "rank": rank}}


def _held_out(rows: Lengths, target: Lengths | None, utility: UtilityConfig) -> Lengths:
    """Rows that score tunings."""
    if target is not None:
        return target.take(min(utility.target_rows, target.rows))
    return rows.take(max(1, min(utility.target_rows, int(MOST_HELD_OUT * rows.rows))))


def _utility(
    work: SelectionWork, played: Lengths, dev: Lengths, utility: UtilityConfig, *, steps: int, times: int, size: int
) -> None:
    """Tunings of a fixed number of steps, each scored on the development rows."""
    work.parts.append(train("tune on coalitions", played, steps=times * steps, batch=utility.batch_size,
                            tuning=_lora(utility.rank), alone=True))  # fmt: skip
    work.parts.append(score("score tunings", dev, batch=size, times=times, alone=True, rank=utility.rank))
    work.evaluations += times
    work.loads += 1


def _shed(
    work: SelectionWork, config: SelectConfig, method: ShedConfig, rows: Lengths, target: Lengths | None,
    table: RowSet | None,
) -> None:  # fmt: skip
    budget, utility = config.budget or SHED_BUDGET, method.utility
    dev = _held_out(rows, target, utility)
    left = rows.rows - (0 if target is not None else dev.rows)
    each = method.proxies or (1 if method.by == "embedding" else LABEL_PROXIES)
    if method.by == "embedding":
        players = player_count(max(2, left), method.players, budget)
    else:
        labels = (table.sources if method.by == "source" else table.domains) if table is not None else []
        players = len({label for label in labels if label is not None})
    played = rows.take(min(left, players * each))
    steps = utility.steps or max(FEWEST_STEPS, math.ceil(played.rows / utility.batch_size))
    if method.mode == "standard" and (method.surrogate or "in_run") == "in_run" and method.estimator_name in (
        "auto", "control_variate",
    ):  # fmt: skip
        epochs = math.ceil(played.rows / utility.batch_size) * SURROGATE_EPOCHS
        _along(work, "surrogate", played, dev, epochs, utility.batch_size, config.batch_size, utility.rank)
    points = method.curves if budget >= 8 * method.curves else 0
    most = min(budget, 2**players + 2 * points) if players < 20 else budget
    _utility(work, played, dev, utility, steps=steps, times=most, size=config.batch_size)
    work.at_most = True


def _along(
    work: SelectionWork, what: str, rows: Lengths, target: Lengths, steps: int, batch: int, size: int, rank: int
) -> None:
    """Steps that tell what they owe to their rows; the target's gradient is taken as often as costs the same."""
    work.parts.append(train(what, rows, steps=steps, batch=batch, tuning=_lora(rank)))
    again = math.ceil(target.rows / batch)
    aims = math.ceil(steps / max(1, again))
    work.parts.append(backward(f"{what}: gradients of the target", target, batch=size, times=aims, tuning=_lora(rank)))
    work.loads += 1


def _in_run(work: SelectionWork, rows: Lengths, target: Lengths, method: InRunConfig) -> None:
    steps = method.epochs * math.ceil(rows.rows / method.batch_size)
    _along(work, "train on all rows", rows, target, steps, method.batch_size, method.batch_size, method.rank)


def _warmed(work: SelectionWork, rows: Lengths, target: Lengths, method: LessConfig | TracinConfig, size: int) -> None:
    warm = rows.take(max(1, round(method.warmup * rows.rows)))
    steps = method.checkpoints * math.ceil(warm.rows / method.batch_size)
    work.parts.append(train("warm up", warm, steps=steps, batch=method.batch_size, tuning=_lora(method.rank)))
    last = isinstance(method, LessConfig) and method.mode == "standard"
    times = 1 if last else method.checkpoints
    for what, lengths in (("gradients of the rows", rows), ("gradients of the target", target)):
        work.parts.append(backward(what, lengths, batch=size, times=times, tuning=_lora(method.rank)))
    work.loads = 1


def _band(
    work: SelectionWork, config: SelectConfig, method: BandConfig, rows: Lengths, target: Lengths | None, kept: int
) -> None:
    sets = 100 // BAND_WIDTH * (2 if method.axis is None else 1) + 1
    dev = _held_out(rows, target, method.utility)
    usable = rows.rows - (0 if target is not None else dev.rows)
    members = min(kept, usable * BAND_WIDTH // 100, BAND_ROWS)
    steps = method.utility.steps or math.ceil(members / method.utility.batch_size)
    times = sets * ((config.budget or BAND_REPEATS * sets) // sets)
    _utility(work, rows.take(min(rows.rows, sets * members)), dev, method.utility, steps=steps, times=times,
             size=config.batch_size)  # fmt: skip
