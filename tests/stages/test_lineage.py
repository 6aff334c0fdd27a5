"""Lineage against brute force: a recipe is run again without a row or client, and what changed must be listed."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import honeloom
from honeloom.cli.main import _run
from honeloom.errors import ConfigError, RowsError, SourceError
from honeloom.runs.manifest import sha256_file
from honeloom.stages.lineage import trace
from honeloom.stages.runner import SIDE_FILES

RECIPE = """version: 1
stages:
  before: {{evaluate: {{model: {model}, rows: {folder}/test.jsonl}}}}
  pick: {{select: {{rows: {folder}/pool.jsonl, keep: 50%}}}}
  first: {{tune: {{model: {model}, rows: $pick, split: [0.0, 0.7], max_steps: 2, batch_size: 2, lr: 0.01}}}}
  second: {{tune: {{model: {model}, rows: {folder}/more.jsonl, max_steps: 1, batch_size: 2, lr: 0.01}}}}
  fed:
    federate:
      model: {model}
      clients: [{{id: ann, rows: {folder}/ann.jsonl}}, {{id: bob, rows: {folder}/bob.jsonl}}]
      rounds: 1
      local_steps: 1
      ranks: 2
      lr: 0.01
  merged: {{merge: {{base_model: {model}, models: [$first, $fed], method: task_arithmetic}}}}
  small: {{drop: {{model: $merged, attention: 1, calibration: {folder}/dev.jsonl, samples: 4}}}}
  after: {{evaluate: {{model: $small, rows: {folder}/test.jsonl, against: $before}}}}
  alone: {{evaluate: {{model: $second, rows: {folder}/test.jsonl}}}}
"""
FILES = ("pool", "more", "ann", "bob", "dev", "test")


def _write(path, count):
    rows = [
        {"id": f"{path.stem}-{i}", "instruction": f"Say {i} of {path.stem}.", "output": f"It is {i * 7}."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def drill(tmp_path_factory, tiny_model):
    """The run, its recipe, and a copy of it that stays as it was."""
    folder = tmp_path_factory.mktemp("drill")
    for name in FILES:
        _write(folder / f"{name}.jsonl", 12)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_model, folder=folder))
    honeloom.run(recipe, output_dir=folder / "run")
    shutil.copytree(folder / "run", folder / "kept")
    return folder


@pytest.fixture(autouse=True)
def _as_it_was(drill):
    yield
    shutil.rmtree(drill / "run", ignore_errors=True)
    shutil.copytree(drill / "kept", drill / "run")
    for name in FILES:
        _write(drill / f"{name}.jsonl", 12)


def _artefacts(run: Path) -> dict[str, dict[str, str]]:
    """The bytes of every stage's result and records, less what tells of settings, places and times."""
    told = {*SIDE_FILES, "rounds.jsonl", "merge.yaml"}
    return {
        folder.name.split("-", 1)[1]: {
            p.relative_to(folder).as_posix(): sha256_file(p)
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in told
        }
        for folder in sorted((run / "stages").iterdir())
    }


def _without(path: Path, row: str) -> None:
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["id"] != row]
    path.write_text("".join(f"{line}\n" for line in lines))


def _selected(run: Path, chosen: bool) -> str:
    kept = {json.loads(line)["id"] for line in (run / "stages" / "2-pick" / "selected.jsonl").read_text().splitlines()}
    return next(f"pool-{i}" for i in range(12) if (f"pool-{i}" in kept) == chosen)


def _reruns(said: list[str]) -> set[str]:
    return {line.split("] ")[1].split(":")[0] for line in said if line.startswith("[") and "reused" not in line}


class Listener:
    """A console that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        """Nothing."""

    def progress(self, label, total):
        from contextlib import nullcontext

        return nullcontext(lambda amount: None)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["selected", "not selected", "more-9", "ann-3", "calibrated", "test-2"])
def test_what_changes_without_a_row_is_listed_and_withdrawing_does_the_same(drill, case):
    row = _selected(drill / "run", case == "selected") if "selected" in case else case
    if case == "calibrated":
        row = pq.read_table(drill / "run" / "stages" / "7-small" / "calibration_rows.parquet")["id"][0].as_py()
    before = _artefacts(drill / "run")
    listed = trace(drill / "run", row)
    heard = Listener()
    honeloom.run(drill / "recipe.yaml", output_dir=drill / "run", resume=True, withdraw=[row], console=heard)
    withdrawn = _artefacts(drill / "run")
    # By brute force: the row is taken out of its file, and everything is done again from nothing.
    shutil.rmtree(drill / "run")
    _without(drill / f"{row.split('-')[0]}.jsonl", row)
    honeloom.run(drill / "recipe.yaml", output_dir=drill / "run")
    brute = _artefacts(drill / "run")
    changed = {name for name in before if before[name] != brute[name]}
    assert changed
    assert changed <= set(listed["rebuild"])
    assert withdrawn == brute
    assert changed <= _reruns(heard.said) <= set(listed["rebuild"])  # nothing else ran


def test_each_use_of_a_row_has_a_name(drill):
    cases = {
        _selected(drill / "run", True): ("pick", "selected"),
        _selected(drill / "run", False): ("pick", "not selected"),
        "ann-3": ("fed", "trained on"),
        "test-2": ("before", "evaluated on"),
    }
    for row, (stage, use) in cases.items():
        told = {s["stage"]: s["touched"] for s in trace(drill / "run", row)["stages"]}
        assert told[stage] == use, row
    calibrated = {
        i: next(s["touched"] for s in trace(drill / "run", f"dev-{i}")["stages"] if s["stage"] == "small")
        for i in range(12)
    }
    assert sorted(calibrated.values()).count("calibrated on") == 4
    assert set(calibrated.values()) == {"calibrated on", "read in calibration"}
    untouched = trace(drill / "run", "nobody")
    assert untouched["rebuild"] == untouched["commands"] == []
    assert {s["touched"] for s in untouched["stages"]} == {"untouched"}


def test_rows_whose_file_is_gone_are_doubted_not_denied(drill):
    (drill / "more.jsonl").unlink()
    answer = trace(drill / "run", "more-9")
    told = {s["stage"]: s["touched"] for s in answer["stages"]}
    assert told["second"].startswith(("trained on", "perhaps read"))
    assert trace(drill / "run", "nobody")["rebuild"] == ["second", "alone"]


def test_what_changes_without_a_client_is_listed(drill):
    before = _artefacts(drill / "run")
    listed = trace(drill / "run", client="ann")
    assert listed["rebuild"] == ["fed", "merged", "small", "after"]
    assert next(s["touched"] for s in listed["stages"] if s["stage"] == "fed") == "trained in round 1"
    (command,) = listed["commands"]
    assert "--set 'fed.without=[ann]'" in command
    honeloom.run(drill / "recipe.yaml", output_dir=drill / "run", resume=True, set=["fed.without=[ann]"])
    after = _artefacts(drill / "run")
    assert {name for name in before if before[name] != after[name]} == set(listed["rebuild"])
    assert trace(drill / "run", client="bob")["rebuild"] == ["fed", "merged", "small", "after"]
    with pytest.raises(SourceError, match="no federation here had it"):
        trace(drill / "run", client="ann")
    ids = [c["id"] for c in json.loads((drill / "run/stages/5-fed/partition.json").read_bytes())["clients"]]
    assert ids == ["bob"]


def test_a_parent_and_an_artefact_are_followed(drill, tiny_model):
    listed = trace(drill / "run", parent=str(tiny_model))
    assert set(listed["rebuild"]) == {"before", "first", "second", "fed", "merged", "small", "after", "alone"}
    assert "--set merged.base_model=OTHER" in listed["commands"][0]
    digest = next(
        r["sha256"] for s in listed["stages"] if s["stage"] == "first" for r in s["reads"] if r["place"] == "model"
    )
    assert trace(drill / "run", parent=digest[:12])["rebuild"] == listed["rebuild"]
    for name in ("first", "$first", str(drill / "run" / "stages" / "3-first")):
        made = trace(drill / "run", artefact=name)
        assert (made["rebuild"], made["made_from"]) == (["merged", "small", "after"], ["pick"])
    assert trace(drill / "run", artefact=str(drill / "dev.jsonl"))["rebuild"] == ["small", "after"]
    with pytest.raises(SourceError, match="did you mean 'merged'"):
        trace(drill / "run", artefact="mergd")
    with pytest.raises(ConfigError, match="one thing at a time"):
        trace(drill / "run", "pool-0", parent="x")


def test_single_results_are_linked_by_their_content_wherever_they_lie(tmp_path, drill, tiny_model):
    honeloom.select(drill / "pool.jsonl", keep="100%", output_dir=tmp_path / "a" / "picked")
    honeloom.tune(tiny_model, tmp_path / "a" / "picked", max_steps=1, batch_size=2, output_dir=tmp_path / "a" / "tuned")
    honeloom.evaluate(tmp_path / "a" / "tuned", rows=drill / "test.jsonl", output_dir=tmp_path / "a" / "score")
    listed = trace(tmp_path / "a", "pool-3")
    assert listed["rebuild"] == ["picked", "tuned", "score"]
    alone = trace(tmp_path / "a" / "score", "pool-3")
    assert [Path(n).name for n in alone["rebuild"]] == ["tuned", "evaluate"] or alone["rebuild"][-1] == "evaluate"
    assert len(alone["rebuild"]) == 3
    (tmp_path / "a").rename(tmp_path / "b")  # no path in inputs.json holds any more
    assert trace(tmp_path / "b", "pool-3")["rebuild"] == ["picked", "tuned", "score"]
    for command in trace(tmp_path / "b", "pool-3")["commands"]:
        assert _run(shlex.split(command)[1:]) == 0
    told = {s["stage"]: s["touched"] for s in trace(tmp_path / "b", "pool-3")["stages"]}
    assert sorted(name for name, how in told.items() if how == "untouched") == [
        "picked-again/select", "score-again/evaluate", "tuned-again/tune",
    ]  # fmt: skip


def test_a_stage_alone_goes_back_to_the_stages_before_it(drill):
    answer = trace(drill / "run" / "stages" / "8-after", _selected(drill / "run", True))
    told = {s["stage"]: s["touched"] for s in answer["stages"]}
    assert told["evaluate"].startswith("through ")
    assert [Path(n).name for n in answer["rebuild"]] == ["2-pick", "3-first", "6-merged", "7-small", "evaluate"]


def test_a_withdrawn_row_does_not_come_in_by_another_way(tmp_path, drill, tiny_model):
    honeloom.tune(tiny_model, drill / "pool.jsonl", max_steps=6, batch_size=4, output_dir=tmp_path / "tuned")
    with pytest.raises(SourceError, match="was made with the row 'pool-3'; make it again without it first"):
        honeloom.evaluate(tmp_path / "tuned", rows=drill / "test.jsonl", withdraw=["pool-3"])
    (tmp_path / "keep.txt").write_text("pool-3\npool-4\n")
    with pytest.raises(RowsError, match=r"must_keep .* holds the row 'pool-3'; take it out"):
        honeloom.select(
            drill / "pool.jsonl", keep="50%", must_keep=tmp_path / "keep.txt", withdraw=["pool-3"],
            output_dir=tmp_path / "picked",
        )  # fmt: skip
    (tmp_path / "gone.txt").write_text("pool-3\n")
    report = honeloom.select(
        drill / "pool.jsonl", keep="100%", withdraw=str(tmp_path / "gone.txt"), output_dir=tmp_path / "picked"
    )
    assert report.details["rows_in"] == 11
    assert json.loads((tmp_path / "picked" / "inputs.json").read_bytes())["inputs"][0]["withdrawn"] == ["pool-3"]
    (tmp_path / "gone.txt").write_text("\n")
    with pytest.raises(RowsError, match="holds no id"):
        honeloom.select(drill / "pool.jsonl", withdraw=str(tmp_path / "gone.txt"), output_dir=tmp_path / "none")


def test_the_command_that_is_printed_does_it(drill):
    row = _selected(drill / "run", True)
    (command,) = trace(drill / "run", row)["commands"]
    assert command == f"honeloom run {drill}/run/recipe.lock.yaml --withdraw {row} --output-dir {drill}/run --resume"
    report = honeloom.run(drill / "run" / "recipe.lock.yaml", output_dir=drill / "run", resume=True, withdraw=[row])
    assert report.status == "ok"
    assert trace(drill / "run", row)["rebuild"] == []  # it is nowhere now
    again = honeloom.run(drill / "run" / "recipe.lock.yaml", output_dir=drill / "run")
    assert again.reused  # the lock goes on withdrawing it
