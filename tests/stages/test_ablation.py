"""Ablations: one stage replaced at a time, measured against the whole recipe."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import honeloom
from honeloom.cli.main import _run
from honeloom.config.recipe import load_recipe, resolve_steps
from honeloom.errors import ConfigError
from honeloom.evaluation.statistics import macro_bootstrap, paired_bootstrap
from honeloom.runs.manifest import verify_folder

WHOLE = """version: 1
vars: {{model: {model}, rows: {rows}}}
stages:
  before: {{evaluate: {{model: $model, rows: $rows}}}}
  pick: {{select: {{rows: $rows, keep: 50%}}}}
  tuned: {{tune: {{model: $model, rows: $pick, max_steps: 1, batch_size: 2, lr: 0.05}}}}
  merged: {{merge: {{base_model: $model, models: [$tuned], method: task_arithmetic}}}}
  small: {{drop: {{model: $merged, attention: 1, calibration: $rows, samples: 4}}}}
  after: {{evaluate: {{model: $small, rows: $rows, against: $before}}}}
"""
ABLATION = """ablation:
  pick: {select: {rows: $rows, keep: 9}}
  merged: $model
  small: [$merged, {merge: {models: [$merged, $model]}}]
"""
NAMES = [
    "1-before", "2-pick", "2-pick.without-pick", "3-tuned", "3-tuned.without-pick", "4-merged", "4-merged.without-pick",
    "5-small", "5-small.without-merged", "5-small.without-pick", "5-small.without-small.2", "6-after",
    "6-after.without-merged", "6-after.without-pick", "6-after.without-small", "6-after.without-small.2",
]  # fmt: skip


@pytest.fixture
def labelled(make_rows):
    path = make_rows()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "domain": "ab"[i % 2]}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture
def whole(tmp_path, labelled, tiny_model):
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE.format(model=tiny_model, rows=labelled))
    return path


@pytest.fixture
def recipe(whole):
    whole.write_text(whole.read_text() + ABLATION)
    return whole


def stage_names(run):
    return sorted(p.name for p in (run / "stages").iterdir())


def examples(run, stage):
    table = pq.read_table(run / "stages" / stage / "examples.parquet").to_pydict()
    return np.array([table["loss_sum"], table["tokens"]]).T, table["domain"]


def test_each_replacement_is_measured_against_the_whole(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert _run(["run", str(recipe), "--output-dir", str(run)]) == 0
    told = capsys.readouterr().out
    assert "less the whole recipe" in told
    assert stage_names(run) == NAMES
    assert verify_folder(run)[1] == []
    report = json.loads((run / "report.json").read_bytes())
    found = report["details"]["ablation"]
    assert json.loads((run / "ablation.json").read_bytes()) == {"schema": "honeloom.ablation/1", "effects": found}
    assert [(e["without"], e["instead"], e["stage"]) for e in found] == [
        ("pick", "keep 9", "after.without-pick"), ("merged", "$model", "after.without-merged"),
        ("small", "$merged", "after.without-small"), ("small", "merge $merged", "after.without-small.2"),
    ]  # fmt: skip
    with_all, domains = examples(run, "6-after")
    for effect in found:
        values, _ = examples(run, f"6-{effect['stage']}")
        alone = paired_bootstrap(values[:, 0], with_all[:, 0], values[:, 1])
        assert effect["difference"] == pytest.approx(alone.difference, abs=1e-12)
        assert effect["ci95"] == pytest.approx([alone.low, alone.high], abs=1e-12)
        assert effect["value"] - effect["whole"] == pytest.approx(alone.difference, abs=1e-9)
        macro = macro_bootstrap(values, with_all, domains, {"a": 0.5, "b": 0.5})
        assert effect["macro"]["difference"] == pytest.approx(macro.difference, abs=1e-12)
        assert effect["macro"]["ci95"] == pytest.approx([macro.low, macro.high], abs=1e-12)
    assert [c.split(" ")[0] for c in report["details"]["comparisons"]]  # those of the whole alone
    assert not any("without" in c for c in report["details"]["comparisons"])
    page = (run / "report.html").read_text()
    assert "Without each stage" in page
    assert "4 replacements" in page
    lock = load_recipe(run / "recipe.lock.yaml")
    assert [s.config for s in resolve_steps(lock, run)] == [s.config for s in resolve_steps(load_recipe(recipe), run)]
    assert honeloom.run(run / "recipe.lock.yaml", output_dir=run).reused


def test_an_ablation_adds_to_a_run_and_leaves_it_as_it_is(whole, tmp_path):
    run = tmp_path / "run"
    honeloom.run(whole, output_dir=run)
    names = stage_names(run)
    stamps = {n: (run / "stages" / n / "report.json").stat().st_mtime_ns for n in names}
    whole.write_text(whole.read_text() + ABLATION)
    plans = honeloom.plan("run", recipe=whole, output_dir=run)
    assert [p.stage for p in plans if p.state == "reuse"] == ["before", "pick", "tuned", "merged", "small", "after"]
    by_name = {p.stage: p for p in plans}
    assert by_name["before"].points == (1, 2, 3, 4, 5)
    assert by_name["small"].points == (1,)
    assert by_name["small.without-pick"].points == (2,)
    assert dict(by_name["small.without-small.2"].values) == {"without": "small", "instead": "merge $merged"}
    honeloom.run(whole, output_dir=run, resume=True)
    assert stage_names(run) == NAMES
    assert {n: (run / "stages" / n / "report.json").stat().st_mtime_ns for n in names} == stamps
    honeloom.run(whole, output_dir=run, set=["ablation={}"], resume=True)
    assert stage_names(run) == names


@pytest.mark.parametrize(
    ("ablation", "message"),
    [
        ("{pikc: $rows}", "ablation: no stage 'pikc'; did you mean 'pick'?"),
        ("{pick: rows}", "ablation: pick: 'rows' is no variable or earlier stage"),
        ("{pick: $tuned}", r"ablation: pick: '\$tuned' is no variable or earlier stage"),
        ("{pick: {chose: {rows: $rows}}}", r"ablation: pick: give another stage as \{verb: settings\}"),
        ("{pick: [{}]}", r"ablation: pick: give another stage as \{verb: settings\}"),
        ("{after: {evaluate: {model: $small, rows: $rows}}}", "ablation: after: no evaluation of rows reads what"),
        ("{pick: []}", "ablation: pick: an empty list"),
        ("{pick: $rows}\nsweep: {pick.keep: [5, 6]}", "a recipe has a sweep or an ablation, not both"),
        ("{pick: {select: {rows: $rows, kep: 3}}}", r"stage 'pick.without-pick' \(select\): unknown key 'kep'"),
        ("{small: {drop: {model: $small, attention: 1, calibration: $rows}}}", r"'\$small' is no variable or earlier"),
        ("{tuned: {select: {rows: $pick, keep: 3}}}", r"models.0.model takes a model or an adapter, and \$tuned"),
    ],
)
def test_what_cannot_stand_in_a_stages_place_is_refused(whole, tmp_path, ablation, message):
    whole.write_text(f"{whole.read_text()}ablation: {ablation}\n")
    with pytest.raises(ConfigError, match=message):
        honeloom.run(whole, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
