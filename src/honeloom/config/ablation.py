"""Ablations: the recipe once whole, and once for every stage in whose place something else stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from honeloom.config.sweep import MAX_POINTS, Point, Variant, references
from honeloom.registry import suggest
from honeloom.verbs import VERBS

__all__ = ["Replacement", "ablated_points", "ablated_variants", "check_ablation", "measures", "replacements"]


@dataclass(frozen=True, slots=True)
class Replacement:
    """What stands in a stage's place: another stage's body ({verb: settings}), or the $name that its readers get."""

    label: str
    stage: str
    instead: Mapping[str, Any] | str

    def told(self, stages: Mapping[str, Mapping[str, Any]]) -> str:
        """A few words of it: how it differs from a stage of the same verb; of another verb what it reads, and how."""
        if isinstance(self.instead, str):
            return self.instead
        verb, settings = next(iter(self.instead.items()))
        before = stages[self.stage].get(verb)
        if not isinstance(settings, Mapping) or not isinstance(before, Mapping):
            read = ", ".join(f"${name}" for name in references(settings) if name in stages)
            method = settings.get("method") if isinstance(settings, Mapping) else None
            return " ".join([verb, *filter(None, (read, f"({_short(method)})" if method else ""))])
        changed = [f"{k} {_short(v)}" for k, v in settings.items() if v != before.get(k)]
        absent = [f"no {k}" for k in before if k not in settings]
        return ", ".join(changed or absent[:1]) or verb


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("type") or ", ".join(value))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def replacements(ablation: Mapping[str, Any]) -> list[Replacement]:
    """All of them, in order; of several for one stage the second is labelled `without-<stage>.2`."""
    found = []
    for stage, given in ablation.items():
        for number, instead in enumerate(given if isinstance(given, list) else [given], 1):
            label = f"without-{stage}" + (f".{number}" if number > 1 else "")  # no name of a stage has a dot
            found.append(Replacement(label, stage, instead))
    return found


def check_ablation(ablation: Mapping[str, Any], stages: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Refuse what cannot stand in a stage's place, or is never measured; raises ValueError."""
    order = list(stages)
    if empty := [stage for stage, given in ablation.items() if given == []]:
        raise ValueError(f"ablation: {empty[0]}: an empty list; name what stands in its place, or leave it out")
    for one in replacements(ablation):
        if one.stage not in stages:
            raise ValueError(f"ablation: no stage {one.stage!r}{suggest(one.stage, order)} (known: {', '.join(order)})")
        what = f"ablation: {one.stage}"
        earlier = [*names, *order[: order.index(one.stage)]]
        if isinstance(one.instead, str):
            if one.instead[:1] != "$" or one.instead[1:] not in earlier:
                raise ValueError(
                    f"{what}: {one.instead!r} is no variable or earlier stage{suggest(one.instead[1:], earlier)}; "
                    f"write $NAME (known: {', '.join(earlier) or 'none'}) or another stage, {{verb: settings}}"
                )
        elif not isinstance(one.instead, Mapping) or len(one.instead) != 1 or next(iter(one.instead)) not in VERBS:
            raise ValueError(
                f"{what}: give another stage as {{verb: settings}}, the $NAME that its readers get instead, or a list "
                f"of such; found {one.instead!r}"
            )
        if not any(measures(stages[name]) for name in _reached(one.stage, stages)):
            raise ValueError(f"{what}: no evaluation of rows reads what it makes, so nothing would tell its effect")
    if (count := len(replacements(ablation)) + 1) > MAX_POINTS:
        raise ValueError(f"ablation: {count} runs, at most {MAX_POINTS}; give fewer replacements")


def measures(body: Mapping[str, Any]) -> bool:
    """Whether a stage evaluates rows: those of two models can be compared one by one."""
    settings = body.get("evaluate")
    return isinstance(settings, Mapping) and bool(settings.get("rows"))


def _reached(stage: str, stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Stages that read a stage's result, directly or through others, in order."""
    found = {stage: True}
    for name, body in stages.items():
        if name not in found and any(r in found for r in references(body)):
            found[name] = True
    return [name for name in found if name != stage]


def ablated_variants(
    name: str,
    ablation: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, Any],
) -> Iterator[Variant]:
    """Every way in which a stage runs: as written, and once for each replacement that it is or that reaches it."""
    verb, settings = next(iter(stages[name].items()))
    yield Variant(name, verb, settings, names, None, {s: s for s in stages}, {})
    for one in replacements(ablation):
        called = _called(one, stages)
        if called[name] == name or (name == one.stage and isinstance(one.instead, str)):
            continue
        given = names
        if isinstance(one.instead, str) and one.instead[1:] in names:
            given = {**names, one.stage: names[one.instead[1:]]}
        if name == one.stage and not isinstance(one.instead, str):
            verb, settings = next(iter(one.instead.items()))
        else:
            verb, settings = next(iter(stages[name].items()))
        values = {"without": one.stage, "instead": one.told(stages)}
        yield Variant(called[name], verb, settings, given, None, called, values)


def ablated_points(ablation: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    """The whole, which is the first, and a point for every replacement."""
    if not ablation:
        return []
    points = [Point(1, {}, {s: s for s in stages})]
    for number, one in enumerate(replacements(ablation), 2):
        points.append(Point(number, {"without": one.stage, "instead": one.told(stages)}, _called(one, stages)))
    return points


def _called(one: Replacement, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Stage -> its name where this stands in a stage's place; that stage has the name of what its readers get."""
    reached: Sequence[str] = _reached(one.stage, stages)
    called = {s: f"{s}.{one.label}" if s in reached or s == one.stage else s for s in stages}
    if isinstance(one.instead, str):
        called[one.stage] = one.instead[1:]
    return called
