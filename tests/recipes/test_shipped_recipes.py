"""The shipped recipes: listed, copied, planned, and run as they are written on the built-in lab."""

from __future__ import annotations

import json

import pytest

import honeloom
from honeloom import lab
from honeloom.cli.main import _run
from honeloom.config.load import load_yaml
from honeloom.config.shipped import shipped_names, shipped_path

NAMES = ["curate-and-tune", "demo", "hub-zoo", "laptop", "private-clients", "whole-loop"]


def run(name, out, *settings):
    report = honeloom.run(shipped_path(name), output_dir=out, set=settings)
    assert all(check.passed for check in report.verification)
    assert _run(["verify", str(out)]) == 0
    return report


def read(path):
    return json.loads(path.read_bytes())


def loss(report, stage, domain="all"):
    return report.metric(f"{stage}/loss", domain).value


def test_ls_prints_one_name_a_line(capsys):
    assert _run(["recipes", "ls"]) == 0
    assert capsys.readouterr().out.splitlines() == NAMES == shipped_names()


def test_cp_writes_a_file_that_runs_and_replaces_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, written in (
        (["laptop"], "laptop.yaml"), (["laptop", "sub/mine.yaml"], "sub/mine.yaml"), (["demo", "sub"], "sub/demo.yaml"),
    ):  # fmt: skip
        assert _run(["recipes", "cp", *arguments]) == 0
        assert capsys.readouterr().out.splitlines() == [written]
    assert (tmp_path / "sub" / "mine.yaml").read_bytes() == shipped_path("laptop").read_bytes()
    (tmp_path / "laptop.yaml").write_text("mine")
    assert _run(["recipes", "cp", "laptop"]) == 2
    assert "exists; name another file, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "laptop.yaml").read_text() == "mine"
    assert _run(["recipes", "cp", "laptop", "--overwrite"]) == 0
    assert (tmp_path / "laptop.yaml").read_bytes() == shipped_path("laptop").read_bytes()
    assert _run(["recipes", "cp", "labtop"]) == 2
    assert "did you mean 'laptop'? (known: curate-and-tune, demo" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_does_and_can_be_planned(name):
    data = load_yaml(shipped_path(name))
    text = shipped_path(name).read_text()
    assert data["description"]
    assert set(data["vars"]) <= {"model", "rows", "search", "calibration", "test", "clients", "keep", "models", "base"}
    assert name == "demo" or f"honeloom recipes cp {name} recipe.yaml" in text
    plans = honeloom.plan("run", recipe=shipped_path(name))
    assert [p.stage for p in plans] == list(data["stages"])
    missing = {d for p in plans for d in p.downloads}
    assert all(model in text.split("version:")[0] for model in missing)  # what must be fetched is told
    assert bool(missing) == (name == "hub-zoo")


@pytest.mark.slow
def test_private_clients_learn_together(tmp_path):
    report = run("private-clients", tmp_path / "run")
    assert loss(report, "after") < loss(report, "before") - 1
    shared = tmp_path / "run" / "stages" / "2-shared"
    assert len(read(shared / "partition.json")["clients"]) == 4


@pytest.mark.slow
def test_laptop_drops_what_the_lab_planted(tmp_path):
    report = run("laptop", tmp_path / "run")
    plan = read(tmp_path / "run" / "stages" / "2-small" / "drop_plan.json")
    assert plan["attention"] == list(lab.PLANTED_LAYERS)
    assert loss(report, "after") < loss(report, "before") * 1.02
    cost = read(tmp_path / "run" / "stages" / "2-small" / "report.json")["details"]["kv_bytes_per_token"]
    assert cost["after"] < cost["before"]
    assert (tmp_path / "run" / "stages" / "4-served" / "model.gguf").stat().st_size > 100_000


@pytest.mark.slow
def test_curate_and_tune_is_better_than_the_base(tmp_path):
    report = run("curate-and-tune", tmp_path / "run")
    assert loss(report, "after") < loss(report, "before") - 1
    assert len(report.details["comparisons"]) == 2


@pytest.mark.slow
def test_whole_loop_learns_and_gets_smaller(tmp_path):
    report = run("whole-loop", tmp_path / "run")
    assert loss(report, "after") < loss(report, "before") - 1
    assert [s["verb"] for s in report.details["stages"]] == [
        "evaluate", "select", "tune", "federate", "glue", "drop", "evaluate", "export",
    ]  # fmt: skip
    assert report.details["stages"][4]["needs"] == ["central", "shared"]
    assert len(read(tmp_path / "run" / "stages" / "4-shared" / "partition.json")["clients"]) == 4


@pytest.mark.slow
def test_hub_zoo_runs_on_folders_in_the_models_place(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        honeloom.tune(
            "lab:base",
            "lab:pool",
            limit=200,
            method="full",
            max_steps=6,
            lr=1e-3,
            seed=seed,
            output_dir=tmp_path / name,
        )
    zoo = f"models=[{tmp_path}/one, {tmp_path}/two]"
    report = run(
        "hub-zoo", tmp_path / "run", zoo, "base=lab:base", "one.budget=3", "before.limit=120", "after.limit=120"
    )
    assert report.details["stages"][1]["verb"] == "glue"
