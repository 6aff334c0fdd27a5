"""Sweeps: points, shared stages, the Pareto table, and a kill in the middle."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import honeloom
from honeloom.config.recipe import load_recipe, resolve_steps
from honeloom.errors import ConfigError
from honeloom.runs import atomic
from honeloom.runs.manifest import verify_folder
from honeloom.stages.sweep import nondominated

RECIPE = """version: 1
vars: {{model: {model}, rows: {rows}}}
stages:
  before: {{evaluate: {{model: $model, rows: $rows}}}}
  pick: {{select: {{rows: $rows, keep: 50%}}}}
  tuned: {{tune: {{model: $model, rows: $pick, max_steps: 1, batch_size: 2, lr: 0.05}}}}
  merged: {{merge: {{base_model: $model, models: [$tuned], method: task_arithmetic}}}}
  small: {{drop: {{model: $merged, attention: 1, calibration: $rows, samples: 4}}}}
  after: {{evaluate: {{model: $small, rows: $rows, against: $before}}}}
sweep: {{pick.keep: [50%, 100%], small.mlp: [0, 1]}}
objectives:
  - {{stage: after, metric: loss}}
  - {{stage: pick, detail: rows_kept}}
"""


@pytest.fixture
def recipe(tmp_path, rows, tiny_model):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model, rows=rows))
    return path


@pytest.fixture(autouse=True)
def _no_observers():
    yield
    atomic.observers.clear()


def stage_names(run):
    return sorted(p.name for p in (run / "stages").iterdir())


ALL = [
    "1-before", "2-pick.1", "2-pick.2", "3-tuned.1", "3-tuned.2", "4-merged.1", "4-merged.2", "5-small.1-1",
    "5-small.1-2", "5-small.2-1", "5-small.2-2", "6-after.1-1", "6-after.1-2", "6-after.2-1", "6-after.2-2",
]  # fmt: skip


def test_stages_run_once_for_all_points_that_share_them(recipe, tmp_path):
    report = honeloom.run(recipe, output_dir=tmp_path / "run")
    assert stage_names(tmp_path / "run") == ALL
    assert verify_folder(tmp_path / "run")[1] == []
    sweep = report.details["sweep"]
    assert json.loads((tmp_path / "run" / "sweep.json").read_bytes()) == {"schema": "honeloom.sweep/1", **sweep}
    assert [p["values"] for p in sweep["points"]] == [
        {"pick.keep": k, "small.mlp": n} for k, n in itertools.product(["50%", "100%"], [0, 1])
    ]
    assert sweep["points"][2]["stages"] == {
        "before": "before", "pick": "pick.2", "tuned": "tuned.2", "merged": "merged.2", "small": "small.2-1",
        "after": "after.2-1",
    }  # fmt: skip
    for point in sweep["points"]:
        last = point["stages"]["after"]
        assert point["objectives"]["after/loss"]["value"] == report.metric(f"{last}/loss").value
        assert point["objectives"]["pick/rows_kept"]["value"] == (6 if point["values"]["pick.keep"] == "50%" else 12)
    numbers = [[o["value"] for o in p["objectives"].values()] for p in sweep["points"]]
    assert [p["pareto"] for p in sweep["points"]] == nondominated(numbers)
    assert any(p["pareto"] for p in sweep["points"])
    lock = load_recipe(tmp_path / "run" / "recipe.lock.yaml")
    again = resolve_steps(lock, tmp_path / "run")
    assert [s.config for s in again] == [s.config for s in resolve_steps(load_recipe(recipe), tmp_path / "run")]
    assert honeloom.run(tmp_path / "run" / "recipe.lock.yaml", output_dir=tmp_path / "run").reused


@pytest.mark.slow
def test_a_value_more_runs_only_what_it_reaches(recipe, tmp_path):
    honeloom.run(recipe, output_dir=tmp_path / "run")
    stamps = {n: (tmp_path / "run" / "stages" / n / "report.json").stat().st_mtime_ns for n in ALL}
    with pytest.raises(ConfigError, match=r"stage 'small.1-1' \(drop\): nothing to drop"):
        honeloom.run(recipe, output_dir=tmp_path / "run", set=["small.attention=0"], resume=True)
    plans = honeloom.plan("run", recipe=recipe, output_dir=tmp_path / "run", set=["sweep.pick.keep=[50%, 100%, 25%]"])
    assert [p.stage for p in plans if p.state == "run"] == [
        "pick.3", "tuned.3", "merged.3", "small.3-1", "small.3-2", "after.3-1", "after.3-2",
    ]  # fmt: skip
    assert {p.stage: p.points for p in plans}["tuned.2"] == (3, 4)
    assert {p.stage: dict(p.values) for p in plans}["small.3-2"] == {"pick.keep": "25%", "small.mlp": 1}
    honeloom.run(recipe, output_dir=tmp_path / "run", set=["sweep.pick.keep=[50%]"], resume=True)
    kept = [n for n in ALL if n.partition(".")[2].startswith("1") or n == "1-before"]
    assert stage_names(tmp_path / "run") == kept
    assert {n: (tmp_path / "run" / "stages" / n / "report.json").stat().st_mtime_ns for n in kept} == {
        n: stamps[n] for n in kept
    }


def test_points_that_come_out_the_same_share_their_results(tmp_path, make_rows, tiny_model):
    rows = make_rows(6)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nvars: {{rows: {rows}}}\nstages:\n"
        "  pick: {select: {rows: $rows, keep: 3}}\n"
        f"  tuned: {{tune: {{model: {tiny_model}, rows: $pick, max_steps: 1}}}}\n"
        f"  score: {{evaluate: {{model: $tuned, rows: $rows}}}}\n"
        "sweep: {pick.keep: [3, 50%, 4]}\n"
    )
    report = honeloom.run(recipe, output_dir=tmp_path / "run")
    # Three rows and half of six are the same rows, so what follows is the same work.
    assert stage_names(tmp_path / "run") == [
        "1-pick.1", "1-pick.2", "1-pick.3", "2-tuned.1", "2-tuned.3", "3-score.1", "3-score.3",
    ]  # fmt: skip
    points = report.details["sweep"]["points"]
    assert points[1]["stages"] == {"pick": "pick.2", "tuned": "tuned.1", "score": "score.1"}
    assert points[0]["objectives"] == points[1]["objectives"] != points[2]["objectives"]
    assert [o["name"] for o in report.details["sweep"]["objectives"]] == ["score/loss"]
    assert verify_folder(tmp_path / "run")[1] == []


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(recipe, tmp_path):
    whole = honeloom.run(recipe, output_dir=tmp_path / "whole")

    class Killed(BaseException):
        pass

    seen = []

    def kill(label):
        if label == "rename 4-merged.2":
            seen.append(label)
            raise Killed

    atomic.observers.append(kill)
    with pytest.raises(Killed):
        honeloom.run(recipe, output_dir=tmp_path / "run")
    atomic.observers.clear()
    assert seen
    assert not (tmp_path / "run").exists()
    report = honeloom.run(recipe, output_dir=tmp_path / "run")
    strip = [{k: v for k, v in m.items() if k != "stages"} for m in report.details["sweep"]["points"]]
    assert strip == [{k: v for k, v in m.items() if k != "stages"} for m in whole.details["sweep"]["points"]]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{pik.keep: [1]}", "no variable or stage's key 'pik.keep'; did you mean 'pick'?"),
        ("{pick: [1]}", "no variable or stage's key 'pick'"),
        ("{pick.keep: []}", "pick.keep has []; give different values"),
        ("{pick.keep: [1, 1]}", "give different values"),
        (
            "{pick.keep: [1, 2, 3, 4, 5, 6, 7, 8, 9], pick.seed: [1, 2, 3, 4, 5, 6, 7, 8]}",
            "72 points (9 x 8), at most 64",
        ),
        ("{pick.kep: [1]}", "unknown key 'kep'; did you mean 'keep'?"),
        ("{pick.keep.x: [1]}", "sweep: pick.keep.x: 'keep' is '50%' and has no parts"),
        ("{}\nobjectives: [{stage: pick, detail: rows_kept}]", "objectives compare the points of a sweep"),
        ("{pick.keep: [1]}\nobjectives: [{stage: pik, detail: x}]", "no stage 'pik'; did you mean 'pick'?"),
        ("{pick.keep: [1]}\nobjectives: [{stage: pick}]", "give metric or detail, one of the two"),
        ("{pick.keep: [1]}\nobjectives: [{stage: pick, metric: x, better: higher}]", "better is about a detail"),
        (
            "{pick.keep: [1]}\nobjectives: [{stage: pick, detail: x}, {stage: pick, detail: x}]",
            "pick/x is given twice",
        ),
    ],
)
def test_mistakes_in_a_sweep_are_named(tmp_path, sweep, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"version: 1\nstages:\n  pick: {{select: {{rows: r.jsonl, keep: 50%}}}}\nsweep: {sweep}\n")
    with pytest.raises(ConfigError) as caught:
        resolve_steps(load_recipe(path), tmp_path)
    assert message in str(caught.value)


def test_variables_methods_and_seeds_can_be_swept(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "version: 1\nvars: {rows: a.jsonl, model: m}\nstages:\n"
        "  pick: {select: {rows: $rows, method: length, model: $model}}\n  other: {select: {rows: b.jsonl, seed: 4}}\n"
        "sweep: {rows: [a.jsonl, c.jsonl], pick.method.type: [random, length], seed: [0, 1]}\n"
    )
    steps = {s.name: s for s in resolve_steps(load_recipe(path, ["pick.method={type: length}"]), tmp_path)}
    assert len(steps) == 9
    assert steps["other"].config.seed == 4
    assert steps["pick.2-1-2"].config.rows == ("c.jsonl",)
    assert steps["pick.2-1-2"].config.method.type == "random"
    assert steps["pick.2-1-2"].config.seed == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_nondominated_is_the_definition(rows):
    kept = [row for row, unbeaten in zip(rows, nondominated(rows), strict=True) if unbeaten]
    assert kept
    for row, unbeaten in zip(rows, nondominated(rows), strict=True):
        better = [k for k in kept if k[0] <= row[0] and k[1] <= row[1] and k != row]
        assert unbeaten == (not better)
