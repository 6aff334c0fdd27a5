"""Importances of attention, MLP and block of every layer, by any number of metrics over one set of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.importance_passes import (
    PaddedBatch,
    Pass,
    StreamPass,
    Tally,
    scores_by_kind,
    units_of,
)
from honeloom.backends.hf.leave_one_out import GradientPass, RestartPass
from honeloom.backends.hf.sublayer_map import Sublayers, evaluating
from honeloom.backends.hf.sublayers import locate
from honeloom.checkpoint.architectures import Architecture
from honeloom.dropping.metric_config import DropMetricConfig
from honeloom.dropping.scores import Score, UnitScores
from honeloom.errors import ConfigError
from honeloom.registry import family

__all__ = ["PaddedBatch", "score_units"]

_PASSES: tuple[tuple[frozenset[str], Any], ...] = (
    (frozenset({"streams"}), StreamPass),
    (frozenset({"losses", "logits"}), RestartPass),
    (frozenset({"gradients"}), GradientPass),
)


def score_units(
    model: Any,
    where: Sublayers | Architecture | None,
    batches: Iterable[Sequence[Encoded] | PaddedBatch],
    metrics: Sequence[DropMetricConfig],
    *,
    consecutive: Sequence[int] = (),
    skip_not_finite: bool = False,
) -> dict[str, UnitScores]:
    """Score every attention, MLP and block of a model.

    The rows are read once. Metrics that read streams share one forward pass; perplexity and kl share restarts,
    L + 1 half-passes per kind of unit on average; taylor takes a forward and a backward pass.

    Parameters
    ----------
    model : transformers model
        Returned as it was: no hook, no changed weight, the same mode.
    where : Sublayers, Architecture or None
        From `locate`, which is called with the layout if it is not given.
    batches : iterable
        Rows of each forward pass, as encoded or padded. Padding never counts; rows without a token are ignored and
        counted.
    metrics : sequence of DropMetricConfig
        Each of another type.
    consecutive : sequence of int
        Numbers n of blocks; windows of n blocks are scored as well.
    skip_not_finite : bool
        Whether rows with NaN or infinite numbers are left out and counted, instead of an error.

    Returns
    -------
    dict
        Type of metric -> its scores.

    Raises
    ------
    NotFiniteError
        A number is NaN or infinite; layer, unit and batch are named.
    RowsError
        No token is left to score.
    CheckpointError
        The layers are not sums of a stream and their halves.
    ConfigError
        A metric is given twice, or more blocks than there are.
    """
    if not isinstance(where, Sublayers):
        where = locate(model, where)
    _require(metrics, consecutive, where.count)
    windows = sorted(set(consecutive))
    tallies = {m.type: Tally(m, where, windows, skip=skip_not_finite) for m in metrics if m.reads != "places"}
    passes = _passes(model, where, list(tallies.values()))
    ignored = 0
    with evaluating(model):
        for number, batch in enumerate(batches) if passes else ():
            padded = PaddedBatch.of(batch, model.device)
            ignored += padded.ignored
            for one in passes if len(padded.ids) else ():
                one.add(padded, number)
    for tally in tallies.values():
        tally.ignored += ignored
    return {m.type: tallies[m.type].result() if m.type in tallies else _places(m, where, windows) for m in metrics}


def _require(metrics: Sequence[DropMetricConfig], consecutive: Sequence[int], layers: int) -> None:
    types = [m.type for m in metrics]
    twice = next((t for t in types if types.count(t) > 1), None)
    if twice:
        raise ConfigError(f"metric {twice} is given twice; give each once")
    odd = next((n for n in consecutive if not 1 <= n <= layers), None)
    if odd is not None:
        raise ConfigError(f"{odd} consecutive blocks: the model has {layers} layers; give 1 to {layers}")


def _passes(model: Any, where: Sublayers, tallies: Sequence[Tally]) -> list[Pass]:
    registry = family("dropping")
    passes: list[Pass] = []
    for reads, kind in _PASSES:
        mine = [tally for tally in tallies if tally.config.reads in reads]
        if mine:
            passes.append(kind(model, where, mine, [registry.load(tally.config.type) for tally in mine]))
    return passes


def _places(config: DropMetricConfig, where: Sublayers, consecutive: Sequence[int]) -> UnitScores:
    """Scores that look at no weight."""
    function = family("dropping").load(config.type)
    units = units_of(config, where, consecutive)
    settings = config.model_dump(exclude={"type"})
    found = {unit: Score(function(unit, where.count, **settings), None) for unit in units}
    return scores_by_kind(config, where, consecutive, found)
