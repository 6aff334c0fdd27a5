"""Recipes: every mistake is named with its place and the near miss; references, overrides and the schema."""

from __future__ import annotations

import itertools
from pathlib import Path

import jsonschema
import pytest

import honeloom.cli
from honeloom.config.base import collect_inputs, validate
from honeloom.config.load import load_yaml
from honeloom.config.recipe import load_recipe, recipe_schema, resolve_steps
from honeloom.config.shipped import shipped_names, shipped_path
from honeloom.dropping.config import DropConfig
from honeloom.errors import ConfigError
from honeloom.evaluation.config import EvaluateConfig
from honeloom.merging.merge_config import MergeConfig
from honeloom.selection.config import SelectConfig
from honeloom.tuning.config import TuneConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CLI = Path(honeloom.cli.__file__).parent
SHIPPED = [
    *sorted((REPOSITORY / "examples").rglob("*.yaml")), CLI / "recipe_template.yaml",
    *(shipped_path(name) for name in shipped_names()),
]  # fmt: skip

GOOD = """version: 1
seed: 7
vars: {model: m, rows: [a.jsonl, b.jsonl], other: n}
stages:
  pick: {select: {rows: $rows, keep: 5%}}
  tuned: {tune: {model: $model, rows: $pick, seed: 3}}
  merged: {merge: {models: [$tuned, {model: $other, weight: 0.5}], base_model: $model, method: linear}}
  score: {evaluate: {model: $merged, rows: [x.jsonl, $rows], against: $tuned}}
"""


@pytest.fixture
def write(tmp_path):
    numbers = itertools.count()

    def save(text):
        path = tmp_path / f"recipe{next(numbers)}.yaml"
        path.write_text(text)
        return path

    return save


@pytest.fixture
def steps(write):
    def resolve(text, overrides=()):
        return {s.name: s for s in resolve_steps(load_recipe(write(text), overrides), Path("/run"))}

    return resolve


def test_references_become_paths_and_lists_are_spliced(steps):
    found = steps(GOOD)
    assert list(found) == ["pick", "tuned", "merged", "score"]
    assert found["pick"].folder == Path("/run/stages/1-pick")
    assert found["pick"].config.rows == ("a.jsonl", "b.jsonl")
    assert found["pick"].config.seed == 7
    assert found["tuned"].config.seed == 3
    assert found["tuned"].config.rows == ("/run/stages/1-pick",)
    assert [s.model for s in found["merged"].config.models] == ["/run/stages/2-tuned", "n"]
    assert found["score"].config.rows == ("x.jsonl", "a.jsonl", "b.jsonl")
    assert found["score"].needs == ("merged", "tuned")
    assert found["pick"].needs == ()


def test_set_reaches_variables_stages_lists_and_the_recipe_itself(steps):
    found = steps(
        GOOD,
        ["model=org/name", "pick.keep=20%", "merged.models.1.weight=2", "pick.method.type=length", "pick.model=$model",
         "seed=9", "rows=[c.jsonl]", "score.limit=3"],
    )  # fmt: skip
    assert found["tuned"].config.model == "org/name"
    assert found["pick"].config.keep == "20%"
    assert found["pick"].config.method.type == "length"
    assert found["pick"].config.model == "org/name"
    assert found["pick"].config.rows == ("c.jsonl",)
    assert found["merged"].config.models[1].weight == 2
    assert found["pick"].config.seed == 9
    assert found["score"].config.limit == 3
    bare = "version: 1\nvars:\nstages:\n  a:\n    select:\n"
    assert steps(bare, ["a.rows=x.jsonl"])["a"].config.rows == ("x.jsonl",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modl=x", "no variable or stage 'modl'; did you mean 'model'?"),
        ("pik.keep=3", "no variable or stage 'pik'; did you mean 'pick'?"),
        ("pick=3", "no variable or stage 'pick'"),
        ("pick.kep=3", "unknown key 'kep'; did you mean 'keep'?"),
        ("merged.models.0.weight=1", "'$tuned' and has no parts"),
        ("nothing", "no variable or stage 'nothing'"),
    ],
)
def test_set_that_leads_nowhere(steps, override, message):
    with pytest.raises(ConfigError) as caught:
        steps(GOOD, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", "version: 2", "version: must be 1"),
        ("version: 1\n", "", "missing key 'version'"),
        ("seed: 7", "sed: 7", "unknown key 'sed'; did you mean 'seed'?"),
        ("{select: {rows: $rows, keep: 5%}}", "{select: {}, tune: {}}", "exactly one verb, found ['select', 'tune']"),
        ("{select: {rows: $rows, keep: 5%}}", "{}", "stage 'pick' must hold exactly one verb, found none"),
        ("{select: {rows", "{selekt: {rows", "stage 'pick': unknown verb 'selekt'; did you mean 'select'?"),
        ("{select: {rows: $rows, keep: 5%}}", "{select: 3}", "the settings of 'select' must be a mapping, found 3"),
        ("pick: {select", "../pick: {select", "stage name '../pick': use letters"),
        ("pick: {select", "model: {select", "'model' is a variable and a stage, so $model is ambiguous"),
        ("rows: $pick", "rows: $pik", "stage 'tuned': '$pik' is no variable or earlier stage; did you mean 'pick'?"),
        ("rows: $rows, keep", "rows: $score, keep", "stage 'pick': '$score' is no variable or earlier stage"),
        ("keep: 5%", "keep: 5%, method: {type: lenght}", "unknown selection method 'lenght'; did you mean 'length'?"),
        ("keep: 5%", "keep: 5%, method: {type: length, order: longst}", "'longest' or 'shortest'"),
        (
            "keep: 5%",
            "method: {type: length, ordr: x}",
            "method 'length' has no setting 'ordr'; did you mean 'order'? (known: order)",
        ),
        ("weight: 0.5", "wieght: 0.5", "'models.1.wieght'; did you mean 'weight'? (known: density, epsilon, gamma, "),
        ("weight: 0.5", "weight: .inf", "must be a finite number"),
        ("keep: 5%", "keep: 0", "counts and tokens are whole numbers above 0"),
        ("seed: 3", "seed: -3", "greater than or equal to 0"),
        ("seed: 3", "device: gpu", "device"),
        ("stages:", "stages: {}\nx:", "stages: must not be empty"),
    ],
)  # fmt: skip
def test_mistakes_are_named(steps, old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        steps(GOOD.replace(old, new, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (SelectConfig, {"rows": "a", "nothing_like_it": 1}, "unknown key 'nothing_like_it' (known: attn, batch_size, "),
        (SelectConfig, {}, "missing key 'rows'"),
        (SelectConfig, {"rows": "a", "split": "0.8-0.2"}, "a split is START-STOP"),
        (SelectConfig, {"rows": "a", "keep": "10 percent"}, "use a share like 10%"),
        (SelectConfig, {"rows": "a", "method": "ifd"}, "needs a model"),
        (TuneConfig, {"model": "m", "rows": "a", "method": {"type": "lora", "rnak": 2}}, "did you mean 'rank'?"),
        (TuneConfig, {"model": "m", "rows": "a", "optimizer": {"type": "adamw", "betta1": 0}}, "did you mean 'beta1'"),
        (TuneConfig, {"model": "m", "rows": "a", "max_steps": 1, "epochs": 1}, "max_steps or epochs, not both"),
        (MergeConfig, {"models": []}, "models"),
        (MergeConfig, {"models": ["a"], "method": "task_arithmetic"}, "needs base_model"),
        (MergeConfig, {"models": ["a", "b", "c"], "method": "slerp"}, "takes exactly 2 models"),
        (DropConfig, {"model": "m", "calibration": "c"}, "nothing to drop"),
        (EvaluateConfig, {"model": "m"}, "nothing to measure"),
    ],
)
def test_settings_are_checked_before_anything_is_read(cls, data, message):
    with pytest.raises(ConfigError) as caught:
        validate(cls, data, what="here")
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        validate(SelectConfig, {"rows": "a", "x": 1, "limit": 0, "max_bad": 2}, what="w")
    assert len(str(caught.value).splitlines()) == 3


def test_settings_are_frozen_and_inputs_are_found_at_their_places():
    config = validate(
        MergeConfig, {"models": ["a", {"model": "b", "weight": 2}], "base_model": "c", "method": "linear"}, what="w"
    )
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    chosen = validate(SelectConfig, {"rows": ["x", "y"]}, what="w")
    assert {(i.place, i.kind, i.value) for c in (config, chosen) for i in collect_inputs(c)} == {
        ("base_model", "model", "c"),
        ("models.0.model", "model", "a"),
        ("models.1.model", "model", "b"),
        ("rows.0", "rows", "x"),
        ("rows.1", "rows", "y"),
    }


@pytest.fixture(scope="module")
def schema():
    found = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_recipes_fit_the_schema_and_resolve(schema, path):
    data = load_yaml(path)
    assert [e.message for e in schema.iter_errors(data)] == []
    assert resolve_steps(load_recipe(path), Path("/run"))


def test_the_schema_takes_what_the_loader_takes_and_refuses_mistakes(schema, write):
    short = GOOD.replace("rows: $rows", "rows: a.jsonl, method: length, model: m, split: 0-0.8")
    for text in (GOOD, short, GOOD.replace("[$tuned, {", "[tuned-1, {")):
        load_recipe(write(text))
        assert [e.message for e in schema.iter_errors(load_yaml(write(text)))] == []
    for old, new in [
        ("version: 1", "version: 2"), ("seed: 7", "sed: 7"), ("keep: 5%", "kep: 5%"), ("{select: {", "{selekt: {"),
        ("{select: {rows: $rows, keep: 5%}}", "{}"), ("weight: 0.5", "wieght: 0.5"), ("rows: $rows, ", ""),
    ]:  # fmt: skip
        assert not schema.is_valid(load_yaml(write(GOOD.replace(old, new, 1)))), new
