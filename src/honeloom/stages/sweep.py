"""What the points of a sweep came to, and which of them no other beats; and what each stage of an ablation is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from honeloom.config.ablation import measures
from honeloom.config.recipe import Recipe
from honeloom.config.sweep import Objective
from honeloom.types.report import Report

__all__ = ["ABLATION_FILE", "SWEEP_FILE", "compare_points", "effects", "nondominated"]

SWEEP_FILE, ABLATION_FILE = "sweep.json", "ablation.json"


def compare_points(recipe: Recipe, reports: Mapping[str, Report], shared: Mapping[str, str]) -> dict[str, Any] | None:
    """The content of `sweep.json`, None where the recipe has no sweep.

    Parameters
    ----------
    recipe : Recipe
        With `sweep`; without objectives of its own its last evaluation is one.
    reports : mapping
        Of every stage that ran, by its name in the run.
    shared : mapping
        Stage -> the one whose result it shares, where settings and content came out the same.

    Returns
    -------
    dict
        `objectives`: each with name, better and unit. `points`: each with its number, values, stages, objectives
        (value and stderr, None where a stage has no such number), and pareto: whether no other point is at least as
        good in all objectives and better in one.
    """
    if not recipe.sweep:
        return None
    objectives = recipe.objectives or _default(recipe, reports, shared)
    points: list[dict[str, Any]] = []
    for point in recipe.points():
        stages = {stage: shared.get(name, name) for stage, name in point.stages.items()}
        found = {o.name: _value(o, reports[stages[o.stage]]) for o in objectives}
        points.append({"point": point.number, "values": dict(point.values), "stages": stages, "objectives": found})
    told = [_describe(o, [reports[p["stages"][o.stage]] for p in points]) for o in objectives]
    signs = [1.0 if o["better"] == "lower" else -1.0 for o in told]
    numbers = [[p["objectives"][o["name"]]["value"] for o in told] for p in points]
    complete = [i for i, row in enumerate(numbers) if row and None not in row]
    best = nondominated([[s * v for s, v in zip(signs, numbers[i], strict=True)] for i in complete])
    for entry in points:
        entry["pareto"] = False
    for i, unbeaten in zip(complete, best, strict=True):
        points[i]["pareto"] = unbeaten
    return {"keys": list(recipe.sweep), "objectives": told, "points": points}


def nondominated(rows: Sequence[Sequence[float]]) -> list[bool]:
    """Which rows of numbers, lower being better, no other row beats: is nowhere higher than, and somewhere lower."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        pairs = list(zip(a, b, strict=True))
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    return [not any(beats(other, row) for other in rows) for row in rows]


def _default(recipe: Recipe, reports: Mapping[str, Report], shared: Mapping[str, str]) -> tuple[Objective, ...]:
    """The main metric of the last evaluation."""
    last = recipe.points()[0].stages
    for stage in reversed(recipe.stages):
        report = reports[shared.get(last[stage], last[stage])]
        if report.verb == "evaluate" and report.metrics:
            return (Objective(stage=stage, metric=report.metrics[0].name),)
    return ()


def _value(objective: Objective, report: Report) -> dict[str, float | None]:
    if objective.metric:
        found = [m for m in report.metrics if m.name == objective.metric and m.domain == objective.domain]
        return {"value": found[0].value, "stderr": found[0].stderr} if found else {"value": None, "stderr": None}
    node: Any = report.details
    for part in (objective.detail or "").split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping):
        node = node.get("after")
    number = isinstance(node, int | float) and not isinstance(node, bool)
    return {"value": float(node) if number else None, "stderr": None}


def _describe(objective: Objective, reports: Sequence[Report]) -> dict[str, str]:
    """Name, direction and unit; a metric's direction is its own."""
    metrics = [m for r in reports for m in r.metrics if objective.metric and m.name == objective.metric]
    better = ("higher" if metrics[0].higher_is_better else "lower") if metrics else objective.better
    return {"name": objective.name, "better": better, "unit": metrics[0].unit if metrics else ""}


def effects(recipe: Recipe, reports: Mapping[str, Report], shared: Mapping[str, str]) -> list[dict[str, Any]]:
    """The content of `ablation.json`: an entry for every replacement, none without an ablation.

    Parameters
    ----------
    recipe : Recipe
        With `ablation`.
    reports, shared : mapping
        As of `compare_points`.

    Returns
    -------
    list of dict
        `without` and `instead` name the stage and what stood in its place; `stage` the last evaluation that the
        replacement reaches, with its `metric`, `unit`, `better`, `value` and `whole` (that of the whole recipe);
        `difference` (value less whole) with `ci95`, paired by rows, and so `macro` and `domains`.
    """
    entries = []
    for point in recipe.points() if recipe.ablation else ():
        if not point.values:
            continue
        last = [s for s, name in point.stages.items() if measures(recipe.stages[s]) and name.startswith(f"{s}.")][-1]
        name = point.stages[last]
        found, whole = reports[shared.get(name, name)], reports[shared.get(last, last)]
        compared = found.details["against"]
        main = found.metric(compared["metric"])
        entries.append({
            **point.values, "point": point.number, "stage": name, "metric": main.name, "unit": main.unit,
            "better": "higher" if main.higher_is_better else "lower",
            "value": main.value, "whole": whole.metric(main.name).value, "n": compared["n"],
            **{key: compared[key] for key in ("difference", "ci95", "macro", "domains")},
        })  # fmt: skip
    return entries
