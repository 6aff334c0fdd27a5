"""Recipes that branch: what a stage may refer to, and that a change runs one branch alone again."""

from __future__ import annotations

import importlib.util
import json

import pytest

import honeloom
from honeloom.config.recipe import load_recipe, resolve_steps
from honeloom.errors import ConfigError, MissingExtraError
from honeloom.stages.references import check_extras, check_references

BRANCHES = """version: 1
vars: {{model: {model}, rows: {rows}}}
stages:
  pick: {{select: {{rows: $rows, keep: 75%}}}}
  again: {{select: {{rows: $rows, keep: 4, must_keep: $few}}}}
  first: {{tune: {{model: $model, rows: $pick, split: [0.0, 0.6], max_steps: 1, batch_size: 2, lr: 0.01}}}}
  second: {{tune: {{model: $model, rows: [$pick, $again], max_steps: 1, batch_size: 2, lr: 0.01}}}}
  summed: {{aggregate: {{adapters: [$first, $second], method: flora}}}}
  both: {{merge: {{base_model: $model, models: [$first, $second], method: task_arithmetic}}}}
  mixed: {{mix: {{experts: [$both, $model], router: random}}}}
  score: {{evaluate: {{model: $both, rows: $rows}}}}
  last: {{evaluate: {{model: $summed, rows: $rows, against: $score, train_rows: [$pick]}}}}
"""


@pytest.fixture
def branches(tmp_path, rows, tiny_model):
    text = BRANCHES.format(model=tiny_model, rows=rows)
    text = text.replace("  again:", "  few: {select: {rows: $rows, keep: 2, seed: 3}}\n  again:")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_references_stand_wherever_an_artefact_is_asked_for(branches, tmp_path, capsys):
    out = tmp_path / "run"
    report = honeloom.run(branches, output_dir=out)
    needs = {s["name"]: s["needs"] for s in report.details["stages"]}
    assert needs["second"] == ["pick", "again"]
    assert needs["summed"] == needs["both"] == ["first", "second"]
    few, again = (
        {json.loads(line)["id"] for line in (out / "stages" / name / "selected.jsonl").read_text().splitlines()}
        for name in ("2-few", "3-again")
    )
    assert few < again
    stamps = {p.name: (p / "report.json").stat().st_mtime_ns for p in (out / "stages").iterdir()}
    honeloom.run(branches, output_dir=out, set=["second.lr=0.02"], resume=True)
    same = {n for n, t in stamps.items() if (out / "stages" / n / "report.json").stat().st_mtime_ns == t}
    assert same == {"1-pick", "2-few", "3-again", "4-first"}  # all others follow the second branch


STAGES = """version: 1
stages:
  pick: {select: {rows: a.jsonl}}
  adapter: {tune: {model: m, rows: $pick}}
  full: {tune: {model: m, rows: $pick, method: full}}
  fed: {federate: {model: m, clients: [{id: a, rows: $pick}]}}
  groups: {glue: {models: [a, b], only: clusters}}
  score: {evaluate: {model: $adapter, rows: $pick}}
  served: {export: {model: $full}}
  file: {drop: {model: $full, attention: 1, calibration: $pick, profile: gguf}}
"""


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "{drop: {model: $adapter, attention: 1, calibration: $pick}}",
            "takes a full model, and $adapter is an adapter",
        ),
        ("{tune: {model: $adapter, rows: $pick}}", "models: [$adapter], method: task_arithmetic}}"),
        (
            "{federate: {model: $fed, clients: [{id: a, rows: $pick}]}}",
            "model takes a full model, and $fed is an adapter",
        ),
        ("{aggregate: {adapters: [$adapter], into_base: $fed}}", "into_base takes a full model"),
        ("{aggregate: {adapters: [$full]}}", "adapters.0 takes an adapter, and $full is what tune makes (model)"),
        ("{tune: {model: m, rows: $full}}", "rows.0 takes rows, and $full is what tune makes (model)"),
        (
            "{tune: {model: $pick, rows: $pick}}",
            "model takes a model or an adapter, and $pick is what select makes (rows)",
        ),
        (
            "{merge: {models: [m, $score]}}",
            "models.1.model takes a model or an adapter, and $score is what evaluate makes",
        ),
        ("{drop: {model: $groups, attention: 1, calibration: $pick}}", "$groups is what glue makes (scores)"),
        ("{evaluate: {model: m, rows: $pick, against: $pick}}", "against takes a model or an adapter"),
        ("{export: {model: $adapter}}", "takes a full model, and $adapter is an adapter"),
        ("{evaluate: {model: $served, rows: $pick}}", "$served is what export makes (gguf)"),
        ("{evaluate: {model: $file, rows: $pick}}", "$file is what drop makes (gguf)"),
    ],
)
def test_references_of_the_wrong_kind_are_refused_before_anything_runs(tmp_path, stage, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{STAGES}  wrong: {stage}\n")
    with pytest.raises(ConfigError) as caught:
        check_references(resolve_steps(load_recipe(path), tmp_path))
    assert message in str(caught.value)
    assert "stage 'wrong'" in str(caught.value)


@pytest.mark.parametrize(
    "stage",
    [
        "{drop: {model: $full, attention: 1, calibration: $pick}}", "{merge: {models: [$adapter, $fed, $full]}}",
        "{aggregate: {adapters: [$adapter, $fed], into_base: $full}}",
        "{glue: {models: [$adapter, $full], only: clusters}}",
        "{evaluate: {model: $fed, rows: $pick, against: $score}}", "{select: {rows: $pick, must_drop: $pick}}",
        "{select: {rows: $pick, method: {type: scores, path: $pick}}}",
    ],
)  # fmt: skip
def test_references_of_the_right_kind_pass(tmp_path, stage):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{STAGES}  right: {stage}\n")
    check_references(resolve_steps(load_recipe(path), tmp_path))


@pytest.mark.parametrize(
    ("stage", "module", "extra"),
    [
        ("{export: {model: $full}}", "gguf", "gguf"),
        ("{drop: {model: $full, attention: 1, calibration: $pick, profile: gguf}}", "gguf", "gguf"),
        ("{drop: {model: $full, attention: 1, calibration: $pick, heal: $pick}}", "peft", "tune"),
        ("{evaluate: {model: $full, tasks: [arc_easy]}}", "lm_eval", "lm-eval"),
        ("{select: {rows: $pick, model: $full, method: shed, ray: local}}", "ray", "ray"),
        ("{federate: {model: $full, partition: {type: iid, n: 2}, rows: $pick, engine: simulation}}", "flwr", "fed"),
    ],
)  # fmt: skip
def test_a_stage_whose_package_is_missing_is_refused_before_anything_runs(tmp_path, monkeypatch, stage, module, extra):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"version: 1\nstages:\n  pick: {{select: {{rows: lab:pool, keep: 9}}}}\n"
        f"  full: {{merge: {{models: [lab:base, lab:base]}}}}\n  last: {stage}\n"
    )
    steps = resolve_steps(load_recipe(path), tmp_path)
    check_extras(steps)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(MissingExtraError, match=rf"stage 'last' .*: {module} is not installed: .*\[{extra}"):
        honeloom.run(path, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
