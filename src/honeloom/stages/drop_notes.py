"""What `drop --dry-run` says: the decision, where importances are known, without any weight; else what is missing."""

from __future__ import annotations

from collections.abc import Mapping

from honeloom.dropping.choice import Ports, choose
from honeloom.dropping.config import DropConfig
from honeloom.dropping.cost import Cost
from honeloom.dropping.plan import Drops, drop_plan
from honeloom.dropping.scores import Unit, UnitScores
from honeloom.errors import HoneloomError
from honeloom.registry import load_target
from honeloom.stages.drop_cache import ScoreCache, read_scores, score_key
from honeloom.stages.drop_source import DropSource, open_source
from honeloom.stages.inputs import ResolvedInput

__all__ = ["drop_notes"]


def drop_notes(config: DropConfig, inputs: Mapping[str, ResolvedInput]) -> tuple[str, ...]:
    """Lines for a person.

    Parameters
    ----------
    config : DropConfig
        The settings.
    inputs : mapping
        Its inputs by place.
    """
    found = inputs["model"]
    if not found.paths:
        return ()
    try:
        source = open_source(config, found)
        if config.only == "scores":
            return ("measures importances and drops nothing",)
        if config.choice != "one_shot" or "loss_increase" in config.budget:
            return (f"what goes is decided by measuring (choice {config.choice}), so it is not known before",)
        scores, where = _scores(config, inputs, source)
        if scores is None and config.layers is None:
            return ("importances of these rows are not known yet; the first run measures and keeps them",)
        drops = choose(config, source.room, _ports(config, source, scores))
    except HoneloomError as error:
        return (f"would be refused: {error}",)
    plan = drop_plan(drops, metric=config.metric.type, profile=config.profile)
    return (
        f"decision ({where}): attention {list(plan.attention)}, mlp {list(plan.mlp)}, blocks {list(plan.block)}",
        f"order: {', '.join(f'{u.kind} {u.layer}' for u in drops)}",
    )


def _scores(
    config: DropConfig, inputs: Mapping[str, ResolvedInput], source: DropSource
) -> tuple[UnitScores | None, str]:
    """Importances that are at hand, and from where."""
    if config.layers is not None:
        return None, "layers as named"
    if config.scores is not None:
        return read_scores(inputs["scores"].paths[0], config, source.room.layers), f"importances of {config.scores}"
    windows = (config.block,) if config.consecutive and config.block > 1 else ()
    cache = ScoreCache(score_key(config, inputs, windows))
    return cache.read(), f"importances kept at {cache.path}"


def _ports(config: DropConfig, source: DropSource, scores: UnitScores | None) -> Ports:
    units: Mapping[Unit, Cost] = {}
    before = Cost(0, 0, 0)
    if config.budget:  # sizes are read from the headers, which takes torch
        units, before = load_target("honeloom.stages.drop_costs:unit_costs")(source.folder)

    def known(drops: Drops) -> UnitScores:
        assert scores is not None and not drops  # a one-shot choice asks for the whole model's
        return scores

    return Ports(known, lambda drops: 0.0, units, before)
