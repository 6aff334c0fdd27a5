"""The recipe: named stages in order, variables, and references between them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from honeloom.config.ablation import ablated_points, ablated_variants, check_ablation, measures
from honeloom.config.base import Config, VerbConfig, Withdrawn, validate
from honeloom.config.load import apply_overrides, load_yaml, parse_scalar
from honeloom.config.shipped import shipped_names
from honeloom.config.sweep import Objective, Point, Variant, check_sweep, points_of, variants_of
from honeloom.errors import ConfigError
from honeloom.registry import load_target, suggest
from honeloom.system import unportable
from honeloom.verbs import VERBS

__all__ = ["Recipe", "Step", "load_recipe", "recipe_schema", "resolve_steps"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
Scalar = str | int | float | bool | None


class Recipe(Config):
    """A recipe file as written; `resolve_steps` turns it into typed stages."""

    version: Literal[1]
    description: str = ""
    seed: int = Field(0, ge=0, description="Seed of every stage that names none.")
    withdraw: Withdrawn = ()
    vars: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict, description="Values for $name.")
    stages: dict[str, dict[str, Any]] = Field(min_length=1, description="Stage name -> {verb: settings}, in order.")
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict, description="Variable or stage's key (pick.keep) -> values; all combinations are run."
    )
    objectives: tuple[Objective, ...] = Field((), description="What the points of the sweep are compared by.")
    ablation: dict[str, Any] = Field(
        default_factory=dict,
        description="Stage -> what stands in its place: another stage ({verb: settings}), the $name that its readers "
        "get, or a list of such. One at a time is replaced, and every evaluation compared with the whole recipe's.",
    )

    @field_validator("vars", "sweep", "ablation", mode="before")
    @classmethod
    def _none_left(cls, value: Any) -> Any:
        return {} if value is None else value  # "vars:" with every line below it commented out

    @field_validator("stages")
    @classmethod
    def _one_verb_each(cls, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, body in stages.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"stage name {name!r}: use letters, digits, '-' and '_', starting with a letter")
            if reason := unportable(name):
                raise ValueError(f"stage name {name!r}: {reason}, and a recipe runs everywhere; take another name")
            if len(body) != 1:
                raise ValueError(f"stage {name!r} must hold exactly one verb, found {list(body) or 'none'}")
            verb = next(iter(body))
            if verb not in VERBS:
                raise ValueError(
                    f"stage {name!r}: unknown verb {verb!r}{suggest(verb, VERBS)} (known: {', '.join(VERBS)})"
                )
        lowered = [name.lower() for name in stages]
        for name in stages:
            if lowered.count(name.lower()) > 1:
                raise ValueError(
                    f"stage name {name!r}: another stage's name differs only in upper and lower case, which Windows "
                    "and macOS do not tell apart; rename one of them"
                )
        return stages

    @model_validator(mode="after")
    def _names_are_clear(self) -> Recipe:
        both = [name for name in self.stages if name in self.vars]
        if both:
            raise ValueError(f"{both[0]!r} is a variable and a stage, so ${both[0]} is ambiguous; rename one of them")
        check_sweep(self.sweep, self.objectives, self.stages, self.vars)
        check_ablation(self.ablation, self.stages, self.vars)
        if self.sweep and self.ablation:
            raise ValueError("a recipe has a sweep or an ablation, not both; put one into a copy of the recipe")
        return self

    def points(self) -> list[Point]:
        """Of the sweep or the ablation; none without one."""
        return points_of(self.sweep, self.stages) or ablated_points(self.ablation, self.stages)

    def variants(self, stage: str) -> list[Variant]:
        """Every way in which a stage runs."""
        if self.ablation:
            return list(ablated_variants(stage, self.ablation, self.stages, self.vars))
        return variants_of(stage, self.sweep, self.stages, self.vars)


@dataclass(frozen=True, slots=True)
class Step:
    """One stage, resolved: `folder` is its place in the run, `config` its typed settings.

    `config` refers to earlier stages by the path they will have; `needs` names those stages. In a sweep `name` is that
    of a variant, `stage` the recipe's, and `values` those of the sweep that reach it.
    """

    name: str
    verb: str
    folder: Path
    config: VerbConfig
    needs: tuple[str, ...]
    stage: str
    values: Mapping[str, Any]


def load_recipe(path: Path, overrides: Sequence[str] = (), withdraw: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `--set`: "model=X" sets a variable, "pick.keep=5%" a stage's key.

    Ids of `withdraw` come to those that the recipe withdraws.
    """
    if path.name in shipped_names() and not path.exists():
        raise ConfigError(f"{path}: no such file; for the shipped recipe: honeloom recipes cp {path.name}")
    data = load_yaml(path)
    swept = {k: v for o in overrides if o.startswith("sweep.") for k, _, v in [o.removeprefix("sweep.").partition("=")]}
    given = apply_overrides(data, [_expand(o, data) for o in overrides if not o.startswith("sweep.")])
    if swept:
        given["sweep"] = {**(given.get("sweep") or {}), **{key: parse_scalar(text) for key, text in swept.items()}}
    if withdraw:
        given["withdraw"] = _together(tuple(withdraw), given.get("withdraw", ()), "")
    return validate(Recipe, given, what=f"recipe {path}")


def _expand(override: str, data: Mapping[str, Any]) -> str:
    """Turn the short forms of `--set` into full paths."""
    path, _, text = override.partition("=")
    head, *rest = path.split(".")
    stages, names = data.get("stages") or {}, data.get("vars") or {}
    if not rest and head in names:
        return f"vars.{override}"
    if rest and head in stages and isinstance(stages[head], dict) and len(stages[head]) == 1:
        verb = next(iter(stages[head]))
        return f"stages.{head}.{verb}.{'.'.join(rest)}={text}"
    if head in Recipe.model_fields:
        return override
    known = [*names, *(f"{s}.KEY" for s in stages)]
    raise ConfigError(
        f"--set {override!r}: no variable or stage {head!r}{suggest(head, [*names, *stages])} "
        f"(known: {', '.join(known)})"
    )


def resolve_steps(recipe: Recipe, run: Path) -> list[Step]:
    """Replace every $name and build each stage's typed settings.

    Parameters
    ----------
    recipe : Recipe
        As loaded.
    run : Path
        The run folder; stage n called x is `run/stages/<n>-<x>`. In a sweep a stage that it reaches is there once
        for every combination of values that reach it, as `<n>-<x>.<numbers of the values>`, and in an ablation for
        every replacement, as `<n>-<x>.without-<stage>`; see `Recipe.variants`.
    """
    steps: list[Step] = []
    for number, name in enumerate(recipe.stages, 1):
        known = {s.name: s for s in steps}
        for variant in recipe.variants(name):
            step = _step(recipe, variant, name, known, run / "stages" / f"{number}-{variant.name}")
            known[step.name] = step
            steps.append(step)
    return steps


def _step(recipe: Recipe, variant: Variant, stage: str, known: Mapping[str, Step], folder: Path) -> Step:
    verb, needs = variant.verb, list[str]()
    earlier = {name: known[called] for name, called in variant.stages.items() if called in known}
    data = _substitute(variant.settings or {}, variant.names, earlier, needs, f"stage {variant.name!r}")
    if not isinstance(data, dict):
        raise ConfigError(f"stage {variant.name!r}: the settings of {verb!r} must be a mapping, found {data!r}")
    cls = load_target(VERBS[verb].config)
    if "without" in variant.values and measures({verb: data}):
        data["against"] = str(known[stage].folder)  # the effect of a stage, with its interval
        needs.append(stage)
    data.setdefault("seed", recipe.seed if variant.seed is None else variant.seed)
    if recipe.withdraw and "withdraw" in cls.model_fields:
        data["withdraw"] = _together(recipe.withdraw, data.get("withdraw", ()), variant.name)
    config = validate(cls, data, what=f"stage {variant.name!r} ({verb})")
    return Step(variant.name, verb, folder, config, tuple(dict.fromkeys(needs)), stage, variant.values)


def _together(whole: str | tuple[str, ...], own: Any, stage: str) -> Any:
    """What the recipe and a stage withdraw, as one."""
    if not own or own == whole:
        return whole
    if isinstance(whole, str) or isinstance(own, str):
        where = (
            f"stage {stage!r}: withdraw stands in the recipe and in the stage"
            if stage
            else (f"withdraw: the recipe names a file, {own!r}, so add the ids to it")
        )
        raise ConfigError(f"{where}; ids come together only as lists")
    return [*dict.fromkeys([*whole, *own])]


def _substitute(value: Any, names: Mapping[str, Any], earlier: Mapping[str, Step], needs: list[str], what: str) -> Any:
    if isinstance(value, dict):
        return {k: _substitute(v, names, earlier, needs, what) for k, v in value.items()}
    if isinstance(value, list):
        items = [_substitute(v, names, earlier, needs, what) for v in value]
        return [x for v, item in zip(value, items, strict=True) for x in (item if _spreads(v, item) else [item])]
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    name = value[1:]
    if name in names:
        return names[name]
    if name in earlier:
        needs.append(earlier[name].name)
        return str(earlier[name].folder)
    known = [*names, *earlier]
    raise ConfigError(
        f"{what}: {value!r} is no variable or earlier stage{suggest(name, known)} (known: {', '.join(known) or 'none'})"
    )


def _spreads(written: Any, item: Any) -> bool:
    """A $name that stands for a list is spliced into the list it stands in."""
    return isinstance(written, str) and isinstance(item, list)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, every verb's settings included, for editors."""
    base = Recipe.model_json_schema()
    definitions: dict[str, Any] = base.pop("$defs", {})
    branches = []
    for verb in VERBS.values():
        schema = load_target(verb.config).model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        schema.pop("title", None)
        properties = {verb.name: _allow_short_forms(schema, definitions)}
        branches.append(
            {"type": "object", "required": [verb.name], "properties": properties, "additionalProperties": False}
        )
    base["properties"]["stages"]["additionalProperties"] = {"oneOf": branches}
    base["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    base["title"] = "honeloom recipe"
    base["$defs"] = {name: _allow_short_forms(d, definitions) for name, d in definitions.items()}
    return base


def _allow_short_forms(schema: dict[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Let every property also be "$name", a method its name alone, and a list of models hold names alone."""
    reference = {"type": "string", "pattern": r"^\$"}
    properties = {
        name: {"anyOf": [p, reference, *_names_alone(p, definitions)], "description": p.get("description", "")}
        for name, p in schema.get("properties", {}).items()
        if name != "type"
    }
    return {**schema, "properties": {**schema.get("properties", {}), **properties}}


def _names_alone(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = schema.get("oneOf", [schema])
    targets = [definitions.get(str(c.get("$ref", "")).removeprefix("#/$defs/"), {}) for c in choices]
    names = [c for t in targets if (c := t.get("properties", {}).get("type", {}).get("const")) is not None]
    if names:
        return [{"enum": names}]
    item = schema.get("items", {}) if schema.get("type") == "array" else {}
    return [{"type": "array", "items": {"anyOf": [item, {"type": "string"}]}}] if "$ref" in item else []
