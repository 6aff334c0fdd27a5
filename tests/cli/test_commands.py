"""verify, report, lineage, methods, doctor, init, rows: they do and print what they claim."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

import honeloom
from honeloom.registry import FAMILIES, family


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, other_model):
    """A run of three stages; read only."""
    root = tmp_path_factory.mktemp("finished")
    rows = root / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"id": f"r{i}", "instruction": f"Say {i}.", "input": "", "output": f"It is {i}."}) + "\n"
            for i in range(8)
        )
        + json.dumps({"id": "bad", "instruction": "Say nothing.", "input": "", "output": ""})
        + "\n"
    )
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"""version: 1
stages:
  pick: {{select: {{rows: {rows}, keep: 50%, max_bad: 0.5}}}}
  merged: {{merge: {{models: [{tiny_model}, {other_model}]}}}}
  score: {{evaluate: {{model: $merged, rows: $pick}}}}
"""
    )
    honeloom.run(recipe, output_dir=root / "out")
    return root / "out"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_verify_of_a_sound_run(cli, finished):
    done = cli("verify", finished)
    files = sum(1 for p in finished.rglob("*") if p.is_file()) - 1
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [f"{files} files checked, 0 problems", str(finished)]
    for stage in sorted((finished / "stages").iterdir()):
        assert cli("verify", stage).code == 0
    document = json.loads(cli("verify", finished, "--json").out)
    assert document["verb"] == "verify"
    assert document["details"] == {"path": str(finished), "files": files, "problems": []}


def test_verify_names_every_file_in_which_a_byte_is_flipped(cli, run):
    names = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.stat().st_size)
    assert len(names) > 30
    for name in names:
        path = run / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0x10]) + whole[middle + 1 :])
        report = honeloom.verify(run)
        assert [p["file"] for p in report.details["problems"]] == [name]
        path.write_bytes(whole)
    (run / "stages" / "2-merged" / "model.safetensors").write_bytes(b"")
    done = cli("verify", run)
    assert done.code == 3
    assert "stages/2-merged/model.safetensors: wrong size (expected " in done.out
    done = cli("verify", run, "--json")
    assert done.code == 3
    (problem,) = json.loads(done.out)["details"]["problems"]
    assert (problem["file"], problem["problem"], problem["found"]) == (
        "stages/2-merged/model.safetensors", "wrong size", 0,
    )  # fmt: skip


def test_report_makes_the_page_again_and_the_run_stays_sound(cli, run):
    (run / "report.html").unlink()
    (run / ".report.html.tmp-1-00000000").touch()
    assert cli("verify", run).code == 3
    done = cli("report", run)
    assert (done.code, done.last) == (0, str(run / "report.html"))
    page = (run / "report.html").read_text()
    assert "Content-Security-Policy" in page
    assert '>score <span class="verb">evaluate</span></h2>' in page
    assert cli("verify", run).code == 0
    assert "run" in os.listdir(run.parent)
    assert [n for n in os.listdir(run.parent) if n.startswith(".")] == []


def test_lineage_of_a_run_and_of_a_row(cli, finished):
    trace = json.loads(cli("lineage", finished, "--json").out)
    assert [(s["stage"], s["verb"]) for s in trace["stages"]] == [
        ("pick", "select"), ("merged", "merge"), ("score", "evaluate"),
    ]  # fmt: skip
    pick, merged, score = trace["stages"]
    assert [r["place"] for r in score["reads"]] == ["model", "rows.0"]
    assert [r["sha256"] for r in score["reads"]] == [merged["sha256"], pick["sha256"]]
    selected = [json.loads(line)["id"] for line in (finished / "stages/1-pick/selected.jsonl").read_text().splitlines()]
    left = next(f"r{i}" for i in range(8) if f"r{i}" not in selected)

    def fate(row):
        return [s["row"] for s in json.loads(cli("lineage", finished, "--row", row, "--json").out)["stages"]]

    assert fate(selected[0]) == ["selected", "untouched", "evaluated on"]
    assert fate(left) == ["not selected", "untouched", "through pick"]  # without it others might have been chosen
    assert fate("bad")[0].startswith("rejected: ")
    assert fate("nobody") == ["untouched"] * 3
    done = cli("lineage", finished, "--row", selected[0])
    assert f"  row {selected[0]}: evaluated on" in done.out.splitlines()
    assert done.last == str(finished)


def test_lineage_of_one_stage_alone(cli, finished):
    trace = json.loads(cli("lineage", finished / "stages" / "1-pick", "--json").out)
    assert [s["stage"] for s in trace["stages"]] == ["select"]


def test_lineage_of_a_row_through_separate_commands(cli, tmp_path, rows, tiny_model, other_model):
    tuned, merged, dropped = tmp_path / "tuned", tmp_path / "merged", tmp_path / "dropped"
    done = cli("tune", tiny_model, rows, "--method", "full", "--epochs", 1, "--output-dir", tuned)
    assert done.code == 0, done.err
    config = tmp_path / "merge.yaml"
    config.write_text(f"models: [{tuned}, {other_model}]\n")
    assert cli("merge", config, merged).code == 0
    assert f"  row r1: through {tuned}" in cli("lineage", merged, "--row", "r1").out.splitlines()
    assert "  row nobody: untouched" in cli("lineage", merged, "--row", "nobody").out.splitlines()
    assert cli("drop", tiny_model, dropped, "--mlp", 1, "--calibration", rows).code == 0
    assert "  row r1: calibrated on" in cli("lineage", dropped, "--row", "r1").out.splitlines()


def test_methods(cli):
    document = json.loads(cli("methods", "--json").out)
    assert {kind: [m["name"] for m in rows] for kind, rows in document.items()} == {
        kind: family(kind).names() for kind in FAMILIES
    }
    assert all(m["version"] >= 1 and m["summary"] and m["paper"] for rows in document.values() for m in rows)
    slerp = next(m for m in document["merging"] if m["name"] == "slerp")
    assert slerp["defaults"] == {"t": 0.5}
    text = cli("methods", "merging").out
    assert text.splitlines()[0] == "merging:"
    assert "  slerp (v2): spherical interpolation of two models" in text.splitlines()
    assert "selection" not in text


def test_doctor(cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    document = json.loads(cli("doctor", "--json", "--no-devices").out)
    assert document["packages"]["honeloom"] == honeloom.__version__
    assert document["extras"]["gguf"]["needs"] == ["gguf"]
    assert document["disk_free_bytes"] > 0
    assert "devices" not in document
    assert "HF_TOKEN" not in document["variables"]
    assert document["hub"]["token"] == "HF_TOKEN"
    done = cli("doctor")
    text = done.out
    assert text.startswith(f"honeloom {honeloom.__version__} on Python ")
    assert re.search(r"device: .+ \(cpu\), [\d.]+ of [\d.]+ GiB free", text)
    assert "token in HF_TOKEN" in text
    assert "hf_a" not in text + done.err
    assert "extra tune: installed, adds tune, and adapters as models" in text


def test_doctor_says_what_a_missing_extra_would_add(cli, monkeypatch):
    from honeloom.runs import environment

    monkeypatch.setattr(environment, "installed_version", lambda name: None if name == "bitsandbytes" else "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    lines = cli("doctor", "--no-devices").out.splitlines()
    assert "extra quant: missing bitsandbytes; adds --load-in 4bit|8bit: pip install 'honeloom[quant]'" in lines
    assert any(line.startswith("hub: ") and "no token (HF_TOKEN" in line for line in lines)


def test_doctor_counts_the_cache(tmp_path, monkeypatch):
    from honeloom.backends import hub

    blob = tmp_path / "models--org--name" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * 1000)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.describe_hub()["cache_bytes"] == 1000


def test_init_writes_a_recipe_that_loads_and_never_overwrites(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("init")
    assert (done.code, done.last) == (0, "recipe.yaml")
    assert sorted(os.listdir(tmp_path)) == ["recipe.schema.json", "recipe.yaml"]
    first = (tmp_path / "recipe.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    plans = json.loads(cli("run", "recipe.yaml", "--dry-run", "--json").out)["stages"]
    assert [p["stage"] for p in plans] == ["before", "pick", "tuned", "merged", "shallow", "after"]
    (tmp_path / "recipe.yaml").write_text("mine")
    assert cli("init").code == 2
    (tmp_path / "recipe.yaml").unlink()
    assert cli("init").code == 2
    assert os.listdir(tmp_path) == ["recipe.schema.json"]
    assert json.loads(cli("init", "--schema").out) == json.loads((tmp_path / "recipe.schema.json").read_text())
    assert cli("init", "new/folder/mine.yaml").last == "new/folder/mine.yaml"


def test_rows_preview_says_what_is_trained(cli, rows, tiny_model):
    document = json.loads(cli("rows", "preview", rows, "--model", tiny_model, "-n", "2", "--json").out)
    assert (document["rows"], len(document["shown"])) == (2, 2)
    pieces = document["shown"][0]["pieces"]
    assert [p["text"] for p in pieces if p["trained"]] == ["It is 0.<|end|>"]
    text = cli("rows", "preview", rows, "--model", tiny_model, "-n", "1").out
    assert "⟦It is 0.<|end|>⟧" in text


def test_rows_convert(cli, rows, tmp_path):
    out = tmp_path / "messages.jsonl"
    done = cli("rows", "convert", rows, out)
    assert (done.code, done.last) == (0, str(out))
    assert "12 rows written, 0 rejected" in done.out
    assert json.loads(out.read_text().splitlines()[0])["messages"] == [
        {"role": "user", "content": "Say 0."},
        {"role": "assistant", "content": "It is 0."},
    ]
    assert cli("rows", "convert", rows, out).code == 2
    before = rows.read_bytes()
    done = cli("rows", "convert", rows, rows, "--overwrite")
    assert (done.code, "a file that this command reads" in done.err) == (2, True)
    assert rows.read_bytes() == before


def test_version_and_help(cli):
    assert cli("--version").out == f"{honeloom.__version__}\n"
    assert cli().code == 2
    text = cli("-h").out
    for command in ("select", "tune", "merge", "drop", "evaluate", "run", "verify", "lineage", "methods", "doctor"):
        assert f"  {command} " in text
