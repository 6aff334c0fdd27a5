"""What a plan says that stages do and cost: counts by hand, sums, and seconds that are measured."""

import json

import pytest

import honeloom
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.load import load_tokenizer
from honeloom.cli.main import main as cli
from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.errors import ConfigError
from honeloom.stages.trials import Trials

RECIPE = """version: 1
vars: {{model: {model}}}
stages:
  before:
    evaluate: {{model: $model, rows: lab:dev, limit: 60}}
  pick:
    select: {{rows: lab:dev, limit: 60, model: $model, method: {{type: ifd}}, keep: 50%}}
  tuned:
    tune: {{model: $model, rows: $pick, max_steps: 3, batch_size: 4}}
  merged:
    merge: {{base_model: $model, models: [$tuned], method: {{type: task_arithmetic}}}}
  shallow:
    drop: {{model: $merged, attention: 1, calibration: lab:dev, samples: 20, measure: 5}}
"""


@pytest.fixture
def recipe(tmp_path, tiny_model):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model))
    return path


def volume(verb, **settings):
    return honeloom.plan(verb, **settings)[0].volume


def volumes(plans):
    return {p.stage: p.volume for p in plans}


def test_rows_and_evaluations_are_counted_without_torch(recipe, tmp_path):
    found = volumes(honeloom.plan("run", recipe=recipe, output_dir=tmp_path / "out"))
    assert {n: v.rows for n, v in found.items()} == {
        "before": 60, "pick": 60, "tuned": 30, "merged": 0, "shallow": len(RowSet.scan(resolve_sources(["lab:dev"]))),
    }  # fmt: skip
    assert [n for n, v in found.items() if v.predicted] == ["tuned"]
    assert (found["tuned"].steps, found["shallow"].evaluations) == (3, 2)
    assert found["pick"].forward_tokens > found["before"].forward_tokens == found["before"].tokens
    assert not any(v.counted for v in found.values())


def test_the_run_has_the_rows_that_the_plan_said(recipe, tmp_path):
    plans = honeloom.plan("run", recipe=recipe, output_dir=tmp_path / "out")
    report = honeloom.run(recipe, output_dir=tmp_path / "out")
    done = {s["name"]: json.loads((tmp_path / "out/stages" / f"{k}-{s['name']}" / "report.json").read_bytes())
            for k, s in enumerate(report.details["stages"], 1)}  # fmt: skip
    found = volumes(plans)
    assert found["before"].rows == done["before"]["details"]["rows"]
    assert found["pick"].rows == done["pick"]["details"]["rows_usable"]
    assert found["tuned"].rows == done["pick"]["details"]["rows_kept"] == done["tuned"]["details"]["rows"]
    assert found["tuned"].steps == done["tuned"]["details"]["steps"]
    assert found["shallow"].evaluations == len(done["shallow"]["details"]["curve"])
    for plan in plans:
        folder = next((tmp_path / "out/stages").glob(f"*-{plan.stage}"))
        real = sum(p.stat().st_size for p in folder.rglob("*"))
        assert plan.cost.disk_bytes == pytest.approx(real, rel=0.3)
    again = honeloom.plan("run", recipe=recipe, output_dir=tmp_path / "out")
    assert {p.state for p in again} == {"reuse"}
    assert again.total["tokens"] == again.total["disk_bytes"] == 0


def test_tokens_are_counted_row_by_row_where_seconds_are_wanted(recipe, tmp_path, tiny_model):
    plans = honeloom.plan("run", recipe=recipe, output_dir=tmp_path / "out", calibrate=True)
    assert not (tmp_path / "out").exists()
    found = volumes(plans)
    encoder = Encoder(load_tokenizer(tiny_model), 128, train=True)
    rows = RowSet.scan(resolve_sources(["lab:dev"]), limit=60)
    assert found["before"].tokens == sum(len(encoder.encode(row).ids) for row in rows)
    assert found["before"].counted
    assert [p.stage for p in plans if not (p.cost.seconds > 0 and p.cost.cpu_seconds > 0)] == []
    assert all(sum(p.cost.parts.values()) == pytest.approx(p.cost.seconds, abs=0.01) for p in plans)
    assert plans.total["seconds"] == pytest.approx(sum(p.cost.seconds for p in plans), abs=0.01)
    memory = [p.cost.memory_bytes for p in plans]
    assert memory == sorted(memory)
    assert plans.total["memory_bytes"] == memory[-1] > 200 << 20
    rate = Trials()
    assert rate.cold("select") is rate.cold("select")


def test_evaluations_of_valuations_and_searches(tmp_path, tiny_model, other_model, make_rows):
    rows, target = make_rows(40), make_rows(6, "target.jsonl")
    shed = {"model": tiny_model, "rows": rows, "target": target, "overlap": "leave_out", "budget": 10}
    found = volume("select", **shed, method={"type": "shed", "players": 5, "curves": 0, "utility": {"steps": 2}})
    # 10 tunings of 2 steps; the surrogate goes through 5 proxies twice, in one step each time.
    assert (found.evaluations, found.steps, found.at_most) == (10, 10 * 2 + 2, True)
    few = volume("select", **shed, method={"type": "shed", "players": 2, "curves": 0, "utility": {"steps": 2}})
    assert few.evaluations == 4  # there are no more coalitions
    band = volume("select", rows=rows, model=tiny_model, target=target, overlap="leave_out",
                  method={"type": "band", "band": "search", "axis": "intra"})  # fmt: skip
    assert band.evaluations == 3 * (5 + 1)
    federated = volume("federate", model=tiny_model, rows=rows, partition={"type": "iid", "n": 4}, rounds=3,
                       local_steps=2, participation=0.5)  # fmt: skip
    assert (federated.evaluations, federated.steps, federated.rows) == (2 * 3 * 2, 3 * 2 * 2, 40)
    zoo = {"models": [tiny_model, other_model], "search_rows": [rows], "mixtures": []}
    glued = volume("glue", zoo={**zoo, "budget": 7})
    # Two models and seven merges on the search rows, the best merge once more, and all three on the report rows.
    assert (glued.evaluations, glued.at_most) == (2 + 7 + 1 + 2 + 1, True)
    greedy = volume("drop", model=tiny_model, attention=1, mlp=1, calibration=rows, choice="greedy")
    assert greedy.evaluations == 3 + (1 + 4 + 3)


def test_importances_that_are_known_are_not_measured_again(tmp_path, tiny_model, make_rows):
    settings = {"model": tiny_model, "attention": 1, "calibration": make_rows(9), "measure": 0}
    before = volume("drop", **settings).forward_tokens
    honeloom.drop(tiny_model, tmp_path / "out", **{k: v for k, v in settings.items() if k != "model"})
    assert before > volume("drop", **settings).forward_tokens == 0


def test_bytes_of_merges_are_those_of_the_report(tmp_path, tiny_model, other_model):
    config = {"models": [str(tiny_model), str(other_model)], "method": {"type": "linear"}}
    planned = volume("merge", config=config)
    done = honeloom.merge(config, tmp_path / "out").details
    assert planned.bytes_read == pytest.approx(done["bytes_read"], rel=0.02)
    assert planned.bytes_written == pytest.approx(done["bytes_written"], rel=0.02)


def test_what_cannot_be_counted_is_said_and_stops_no_plan(tmp_path, tiny_model, capsys):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (plan,) = honeloom.plan("evaluate", model=tiny_model, rows=tmp_path / "bad.jsonl")
    assert "no usable row" in plan.volume.unknown
    with pytest.raises(SystemExit):
        cli(["evaluate", str(tiny_model), "--rows", str(tmp_path / "bad.jsonl"), "--dry-run"])
    assert "evaluate: no usable row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in": "4bit"}, "leave --load-in out"),
        ({"model": "org/nothing-here"}, "not downloaded yet"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_runs(rows, tiny_model, settings, message, monkeypatch):
    monkeypatch.setattr("honeloom.stages.trials._run", lambda *_: pytest.fail("a trial was made"))
    with pytest.raises(ConfigError, match=message):
        honeloom.plan("evaluate", calibrate=True, **{"model": tiny_model, "rows": rows, **settings})


def test_one_of_several_processes_times_nothing(rows, tiny_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="plan without a launcher"):
        honeloom.plan("tune", calibrate=True, model=tiny_model, rows=rows)
    assert volume("tune", model=tiny_model, rows=rows, batch_size=3).steps == 12 / 3 / 2


def test_calibrate_without_a_plan_is_refused_by_run(recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(["run", str(recipe), "--calibrate", "--output-dir", "never"])
    assert stopped.value.code == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_a_person_and_a_program_read_the_total(recipe, tmp_path, capsys):
    command = ["run", str(recipe), "--output-dir", str(tmp_path / "out"), "--dry-run"]
    with pytest.raises(SystemExit):
        cli(command)
    printed = capsys.readouterr().out
    assert "what it takes" in printed
    assert "in all" in printed
    with pytest.raises(SystemExit):
        cli([*command, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["total"]["rows"] == sum(s["volume"]["rows"] for s in document["stages"])
    assert document["total"]["memory_bytes"] == max(s["cost"]["memory_bytes"] for s in document["stages"])
    assert document["total"]["seconds"] is None
    assert "needs" in document["stages"][0]
