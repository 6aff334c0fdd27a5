"""What every command promises: exit codes, streams, plans, reuse, interruption, and no secrets anywhere."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time

import pytest

from honeloom.runs import atomic
from honeloom.runs.lock import writer_lock
from honeloom.runs.manifest import verify_folder
from honeloom.stages import select as stages_select

RECIPE = """version: 1
description: three stages
vars: {{rows: {rows}, note: nothing}}
stages:
  pick: {{select: {{rows: $rows, keep: 50%}}}}
  merged: {{merge: {{models: [{model}, {other}]}}}}
  score: {{evaluate: {{model: $merged, rows: $pick}}}}
"""


@pytest.fixture
def recipe(tmp_path, rows, tiny_model, other_model):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(rows=rows, model=tiny_model, other=other_model))
    return path


@pytest.fixture(autouse=True)
def _no_observers():
    yield
    atomic.observers.clear()


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_the_last_line_is_the_output_s_path(cli, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("select", rows, "--keep", "3", "--output-dir", "mit leer größe")
    assert done.code == 0
    assert done.last == str(tmp_path / "mit leer größe")
    assert len((tmp_path / done.last / "selected.jsonl").read_text().splitlines()) == 3


def test_the_last_line_is_where_a_reused_output_is_now(cli, rows, tmp_path):
    cli("select", rows, "--output-dir", tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    done = cli("select", rows, "--output-dir", tmp_path / "after")
    assert "select: reused" in done.out
    assert done.last == str(tmp_path / "after")


def test_json_is_one_document_equal_to_the_file_and_the_rest_is_on_stderr(cli, rows, tmp_path):
    out = tmp_path / "out"
    first = cli("select", rows, "--output-dir", out, "--json")
    assert json.loads(first.out) == json.loads((out / "report.json").read_bytes())
    assert "select: random over 12 rows" in first.err
    again = cli("select", rows, "--output-dir", out, "--json")
    assert again.out == first.out
    assert "select: reused" in again.err


def test_the_second_run_is_reused_and_touches_nothing(cli, recipe, tmp_path):
    out = tmp_path / "out"
    first = cli("run", recipe, "--output-dir", out)
    assert (first.code, first.last) == (0, str(out))
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    second = cli("run", recipe, out)
    assert (second.code, second.last) == (0, str(out))
    assert [line for line in second.out.splitlines() if line.endswith(": reused")] == [
        "pick: reused",
        "merged: reused",
        "score: reused",
    ]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps


def test_a_changed_last_stage_runs_alone_and_needs_resume(cli, recipe, tmp_path):
    out = tmp_path / "out"
    assert cli("run", recipe, "--output-dir", out).code == 0
    merged = (out / "stages" / "2-merged" / "model.safetensors").stat()
    refused = cli("run", recipe, "--output-dir", out, "--set", "score.limit=4")
    assert refused.code == 2
    assert "pass --overwrite" in refused.err
    done = cli("run", recipe, "--output-dir", out, "--set", "score.limit=4", "--resume")
    assert done.code == 0
    assert [line for line in done.out.splitlines() if line.startswith("[")] == [
        "[1/3] pick: reused",
        "[2/3] merged: reused",
        "[3/3] score: evaluate",
    ]
    assert (out / "stages" / "2-merged" / "model.safetensors").stat().st_mtime_ns == merged.st_mtime_ns
    assert json.loads((out / "stages" / "3-score" / "report.json").read_bytes())["details"]["rows"] == 4
    assert verify_folder(out)[1] == []


def test_changed_rows_run_again_what_reads_them_and_touched_ones_do_not(cli, recipe, rows, tmp_path):
    out = tmp_path / "out"
    cli("run", recipe, "--output-dir", out)
    os.utime(rows, (0, 0))
    assert "pick: reused" in cli("run", recipe, "--output-dir", out).out
    rows.write_text(rows.read_text().replace("It is 1.", "It is one."))
    done = cli("run", recipe, "--output-dir", out, "--resume")
    assert [line for line in done.out.splitlines() if line.startswith("[")] == [
        "[1/3] pick: select",
        "[2/3] merged: reused",
        "[3/3] score: evaluate",
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(cli, recipe, tmp_path, as_json):
    before = tree(tmp_path)
    out = tmp_path / "out"
    done = cli("run", recipe, "--output-dir", out, "--dry-run", *(["--json"] if as_json else []))
    assert done.code == 0
    assert tree(tmp_path) == before
    if as_json:
        plan = json.loads(done.out)
        assert plan["schema"] == "honeloom.plan/1"
        assert [(s["stage"], s["verb"], s["state"]) for s in plan["stages"]] == [
            ("pick", "select", "run"),
            ("merged", "merge", "run"),
            ("score", "evaluate", "run"),
        ]
        assert plan["stages"][0]["config"]["keep"] == "50%"
    cli("run", recipe, "--output-dir", out)
    plan = json.loads(cli("run", recipe, "--output-dir", out, "--dry-run", "--json").out)
    assert [s["state"] for s in plan["stages"]] == ["reuse", "reuse", "reuse"]
    changed = ("--set", "score.limit=4", "--dry-run", "--json")
    plan = json.loads(cli("run", recipe, "--output-dir", out, *changed).out)
    assert [s["state"] for s in plan["stages"]] == ["reuse", "reuse", "run"]


def test_dry_run_of_a_verb(cli, rows, tmp_path):
    out = tmp_path / "out"
    plan = json.loads(cli("select", rows, "--output-dir", out, "--dry-run", "--json").out)
    assert plan["stages"][0]["state"] == "run"
    assert plan["stages"][0]["inputs"] == {"rows.0": str(rows)}
    assert not out.exists()
    cli("select", rows, "--output-dir", out)
    plan = json.loads(cli("select", rows, "--output-dir", out, "--dry-run", "--json").out)
    assert plan["stages"][0]["state"] == "reuse"


def test_exit_2_for_what_the_user_can_mend(cli, rows, tmp_path, tiny_model):
    out = tmp_path / "out"
    cases = {
        ("select", rows): "give an output folder (--output-dir OUT)",
        ("select", rows, "--output-dir", out, "--kep", "5"): "no such option '--kep'; did you mean '--keep'",
        ("select", rows, "--output-dir", out, "--keep", "0%"): "a share lies in (0%, 100%]",
        ("select", rows, "--output-dir", out, "--method", "lenght"): "'lenght'; did you mean 'length'?",
        ("select", rows, "--output-dir", out, "--method", "ifd"): "needs a model (--model)",
        ("select", rows, "--output-dir", out, "--set", "kepp=3"): "unknown key 'kepp'; did you mean 'keep'?",
        ("select", rows, "--output-dir", out, "--set", "mode=resume"): "unknown key 'mode'; did you mean",
        ("select", rows, "--output-dir", out, "--set", "keep"): "expected KEY=VALUE",
        ("select", f"{rows}x", "--output-dir", out): "no such file or folder",
        ("select", rows, "--output-dir", out, "--overwrite", "--resume"): "exclude each other",
        ("select", rows, "--output-dir", out, "--device", "tpu"): "device",
        ("merge", tmp_path / "no.yaml", out): "No such file",
        ("run", tmp_path / "no.yaml", out): "No such file",
        ("run", tmp_path, out): "cannot be read",
        ("evaluate", tiny_model): "nothing to measure",
        ("evaluate", "../nothing", "--rows", rows): "no such folder",
        ("evaluate", "org/..", "--rows", rows): "no such folder",
        ("evaluate", "org/na--me", "--rows", rows): "no such folder",
        ("evaluate", "\u043erg/name", "--rows", rows): "no such folder",
        ("evaluate", "~nobody-has-this-name/model", "--rows", rows): "no such folder",
        ("evaluate", "or\ng/name", "--rows", rows): "control characters",
        ("evaluate", "or\0g/name", "--rows", rows): "control characters",
        ("evaluate", rows, "--rows", rows): "no such folder",
        ("evaluate", tmp_path, "--rows", rows): "no config.json or adapter_config.json (found rows.jsonl)",
        ("verify", tmp_path / "nothing"): "is not a folder",
        ("lineage", tmp_path): "not a finished honeloom result",
        ("report", tmp_path): "not a finished honeloom result",
        ("methods", "mergin"): "unknown kind 'mergin'; did you mean 'merging'?",
        ("rows", "convert", rows, tmp_path / "x.jsonl", "--to", "xml"): "choose one of",
        ("nonsense",): "no such command 'nonsense'",
    }
    for arguments, message in cases.items():
        done = cli(*arguments)
        assert done.code == 2, (arguments, done)
        assert message in done.err, (arguments, done.err)
        assert done.out == "", arguments
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_out_given_twice(cli, tmp_path, tiny_model, other_model):
    config = tmp_path / "merge.yaml"
    config.write_text(f"models: [{tiny_model}, {other_model}]\n")
    done = cli("merge", config, tmp_path / "a", "--output-dir", tmp_path / "b")
    assert done.code == 2
    assert "OUT is given twice" in done.err
    assert cli("merge", config, tmp_path / "a").last == str(tmp_path / "a")
    assert cli("merge", config, "--output-dir", tmp_path / "b").last == str(tmp_path / "b")


@pytest.mark.parametrize("key", ["mode", "output_dir", "console", "config"])
def test_a_key_of_a_merge_file_never_meets_a_parameter_of_that_name(cli, tmp_path, tiny_model, key):
    config = tmp_path / "merge.yaml"
    config.write_text(f"models: [{tiny_model}]\n{key}: x\n")
    done = cli("merge", config, tmp_path / "out")
    assert done.code == 2
    assert f"unknown key {key!r}" in done.err


@pytest.mark.parametrize("command", ["run", "merge"])
def test_the_configuration_itself_is_never_replaced(cli, tmp_path, tiny_model, command):
    out = tmp_path / "out"
    out.mkdir()
    config = out / "config.yaml"
    stage = f"models: [{tiny_model}]"
    config.write_text(f"version: 1\nstages: {{m: {{merge: {{{stage}}}}}}}\n" if command == "run" else stage)
    done = cli(command, config, out, "--overwrite")
    assert done.code == 2
    assert "which this command reads" in done.err
    assert os.listdir(out) == ["config.yaml"]


def test_exit_1_for_a_locked_output(cli, rows, tmp_path):
    with writer_lock(tmp_path / "out"):
        done = cli("select", rows, "--output-dir", tmp_path / "out")
    assert done.code == 1
    assert f'"pid": {os.getpid()}' in done.err


def test_exit_1_for_a_full_disk_with_nothing_left(cli, rows, tmp_path):
    def full(label):
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic.observers.append(full)
    done = cli("select", rows, "--output-dir", tmp_path / "out")
    assert done.code == 1
    assert "No space left on device" in done.err
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_exit_3_for_a_result_that_is_not_what_it_claims(cli, rows, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as broken:
        write = stages_select.write_selected
        broken.setattr(stages_select, "write_selected", lambda rows, keep, folder: write(rows, keep[:-1], folder))
        done = cli("select", rows, "--keep", "4", "--output-dir", out)
    assert done.code == 3
    assert "measured 3, limit 4; nothing was published, the evidence is in" in done.err
    assert not out.exists()
    assert cli("select", rows, "--keep", "4", "--output-dir", out).code == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "rows.jsonl"]
    assert verify_folder(out)[1] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_so_and_can_be_run_again(cli, recipe, tmp_path, tmp_path_factory, number, code):
    out, mark = tmp_path / "out", tmp_path / "mark"
    said = tmp_path_factory.mktemp("streams") / "err"

    def wait(label: str) -> None:
        if label == "rename 2-merged":
            mark.touch()
            time.sleep(60)

    pid = os.fork()
    if pid == 0:
        atomic.observers.append(wait)
        status = 99
        sys.stderr = said.open("w", buffering=1)
        try:
            from honeloom.cli.main import main

            main(["run", str(recipe), "--output-dir", str(out)])
        except SystemExit as stopped:
            status = stopped.code
        finally:
            os._exit(status)
    deadline = time.monotonic() + 150
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mark.exists()  # a signal that comes earlier may meet an import, which can swallow it
    time.sleep(0.2)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    ended = "interrupted" if number == signal.SIGINT else "terminated"
    assert f"error: {ended}; run the same command again to go on from here" in said.read_text()
    assert not out.exists()
    done = cli("run", recipe, "--output-dir", out)
    assert done.code == 0
    assert "[1/3] pick: reused" in done.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mark", "out", "recipe.yaml", "rows.jsonl"]
    assert verify_folder(out)[1] == []


def test_secrets_reach_no_file_and_no_terminal(cli, recipe, tmp_path, monkeypatch):
    token, key = "hf_" + "Zq9" * 12, "0123456789abcdef0123456789abcdef"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WANDB_API_KEY", key)
    out = tmp_path / "out"
    overrides = ("--set", f"description=made with {token}", "--set", f"note={key}")
    streams = []
    for extra in (["--dry-run"], ["--dry-run", "--json"], [], ["--json"]):
        done = cli("run", recipe, "--output-dir", out, *overrides, *extra)
        assert done.code == 0
        streams += [done.out, done.err]
    failed = cli("evaluate", f"org/{key}", "--rows", tmp_path / "rows.jsonl")
    assert failed.code == 2
    streams += [failed.out, failed.err]
    for text in streams:
        assert token not in text
        assert key not in text
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) > 30
    for path in files:
        data = path.read_bytes()
        assert token.encode() not in data, path
        assert key.encode() not in data, path
    assert json.loads((out / "report.json").read_bytes())["details"]["description"] == "made with [secret]"
