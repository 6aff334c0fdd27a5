"""Sweeps: a small grid over a recipe's values, and the stages that its points share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal

from pydantic import Field, model_validator

from honeloom.config.base import Config
from honeloom.config.load import set_value
from honeloom.registry import suggest

__all__ = ["MAX_POINTS", "Objective", "Point", "Variant", "check_sweep", "points_of", "references", "variants_of"]

MAX_POINTS = 64
_REFERENCE = re.compile(r"\$([A-Za-z][\w-]*)")


class Objective(Config):
    """What the points of a sweep are compared by: a metric of a stage, or a number of its details."""

    stage: str
    metric: str | None = Field(None, description="Name of a metric, for example loss; it knows which way is better.")
    domain: str = Field("all", description="Of the metric.")
    detail: str | None = Field(
        None,
        description="Dotted place in the stage's details, for example params; of {before, after} the latter counts.",
    )
    better: Literal["lower", "higher"] = Field("lower", description="Of a detail.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Objective:
        if (self.metric is None) == (self.detail is None):
            raise ValueError(f"objective of stage {self.stage!r}: give metric or detail, one of the two")
        fields = type(self).model_fields
        idle = ("domain",) if self.detail else ("better",)
        if wrong := [n for n in idle if getattr(self, n) != fields[n].default]:
            raise ValueError(
                f"objective of stage {self.stage!r}: {wrong[0]} is about a {'metric' if self.detail else 'detail'}; "
                "leave it out"
            )
        return self

    @property
    def name(self) -> str:
        """As in tables."""
        if self.detail:
            return f"{self.stage}/{self.detail}"
        return f"{self.stage}/{self.metric}" + ("" if self.domain == "all" else f" ({self.domain})")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a stage runs: its name, verb and settings, and what $names mean to it.

    `values` are those of the sweep that reach it, its own and those of the stages it reads; of an ablation, which stage
    is replaced and by what.
    """

    name: str
    verb: str
    settings: Any
    names: Mapping[str, Any]
    seed: int | None
    stages: Mapping[str, str]
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the grid: its values, and for every stage the variant that belongs to it."""

    number: int
    values: Mapping[str, Any]
    stages: Mapping[str, str]


def check_sweep(
    sweep: Mapping[str, Sequence[Any]],
    objectives: Sequence[Objective],
    stages: Mapping[str, Any],
    names: Mapping[str, Any],
) -> None:
    """Refuse a grid that leads nowhere or is too large, and objectives without one; raises ValueError."""
    for key, values in sweep.items():
        head, _, rest = key.partition(".")
        if not ((head in stages and rest) or (not rest and (head in names or head == "seed"))):
            near = suggest(head, [*names, "seed", *stages])
            known = ", ".join([*names, "seed", *(f"{s}.KEY" for s in stages)])
            raise ValueError(f"sweep: no variable or stage's key {key!r}{near} (known: {known})")
        if not values or any(values[i] in values[:i] for i in range(len(values))):
            raise ValueError(f"sweep: {key} has {list(values)}; give different values, at least one")
    if (count := prod(map(len, sweep.values()))) > MAX_POINTS:
        raise ValueError(
            f"sweep: {count} points ({' x '.join(str(len(v)) for v in sweep.values())}), at most {MAX_POINTS}; give "
            "fewer values, or run several sweeps"
        )
    if objectives and not sweep:
        raise ValueError("objectives compare the points of a sweep, and there is none; give sweep, or leave them out")
    for objective in objectives:
        if objective.stage not in stages:
            raise ValueError(f"objectives: no stage {objective.stage!r}{suggest(objective.stage, stages)}")
    doubled = [o.name for i, o in enumerate(objectives) if o.name in [p.name for p in objectives[:i]]]
    if doubled:
        raise ValueError(f"objectives: {doubled[0]} is given twice")


def _reach(sweep: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Stage -> keys of the sweep that change it, by its own settings, variables, or what it reads."""
    found: dict[str, list[str]] = {}
    for name, body in stages.items():
        own = [key for key in sweep if key.partition(".")[0] == name]
        used = {*references(body), *(r for key in own for r in references(list(sweep[key])))}
        through = {key for earlier in used if earlier in found for key in found[earlier]}
        settings = next(iter(body.values()))
        seeded = not isinstance(settings, Mapping) or "seed" not in settings
        found[name] = [k for k in sweep if k in own or k in used or k in through or (k == "seed" and seeded)]
    return found


def references(value: Any) -> Iterator[str]:
    """Names that settings refer to as $name."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)
    elif isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
        yield match[1]


def variants_of(
    name: str,
    sweep: Mapping[str, Sequence[Any]],
    stages: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, Any],
) -> list[Variant]:
    """Every way in which a stage runs in a sweep, one where the sweep does not reach it.

    Its name is the stage's, and after a dot the numbers of the values that reach it, in the order of the sweep's
    keys: `small.2-1` has the second value of the first key. Adding values at the end of a list renames nothing.
    """
    reach = _reach(sweep, stages)
    found = []
    for choice in product(*(range(len(sweep[key])) for key in reach[name])):
        index = dict(zip(reach[name], choice, strict=True))
        values = {key: sweep[key][i] for key, i in index.items()}
        verb, settings = next(iter(stages[name].items()))
        for key, value in values.items():
            head, _, rest = key.partition(".")
            if head == name and rest:
                settings = set_value(settings or {}, rest, value, f"sweep: {key}")
        earlier = {s: _called(s, reach[s], index) for s in stages if set(reach[s]) <= set(index)}
        given = {**names, **{key: value for key, value in values.items() if key in names}}
        called = _called(name, reach[name], index)
        found.append(Variant(called, verb, settings, given, values.get("seed"), earlier, values))
    return found


def _called(stage: str, keys: Sequence[str], index: Mapping[str, int]) -> str:
    numbers = "-".join(str(index[key] + 1) for key in keys)
    return f"{stage}.{numbers}" if numbers else stage


def points_of(sweep: Mapping[str, Sequence[Any]], stages: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    """All points, the last key's values changing fastest; none without a sweep."""
    if not sweep:
        return []
    reach = _reach(sweep, stages)
    points = []
    for number, choice in enumerate(product(*(range(len(values)) for values in sweep.values())), 1):
        index = dict(zip(sweep, choice, strict=True))
        values = {key: sweep[key][i] for key, i in index.items()}
        points.append(Point(number, values, {s: _called(s, keys, index) for s, keys in reach.items()}))
    return points
