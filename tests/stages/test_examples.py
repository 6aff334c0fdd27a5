"""The shipped recipes run from beginning to end, and their results hold."""

from pathlib import Path

import pytest

import honeloom
from honeloom.cli.main import _run
from honeloom.config.shipped import shipped_path

ROOT = Path(__file__).resolve().parents[2]
FAST = ["tuned.max_steps=8", "shallow.samples=16"]


@pytest.mark.slow
def test_real_example_learns_and_verifies(tmp_path, shared_data, capsys):
    model, rows = shared_data / "models" / "stories260k", shared_data / "instruct" / "mini.jsonl"
    out = tmp_path / "run"
    settings = [f"model={model}", f"rows={rows}", *FAST]
    arguments = ["run", str(ROOT / "examples" / "real.yaml"), "--output-dir", str(out)]
    arguments += [part for s in settings for part in ("--set", s)]
    assert _run(arguments) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[-1] == str(out)
    report = honeloom.run(ROOT / "examples" / "real.yaml", output_dir=out, set=settings)
    assert report.reused
    losses = {m.name.split("/")[0]: m.value for m in report.metrics if m.name.endswith("/loss") and m.domain == "all"}
    assert losses["after"] < losses["before"] - 0.2
    assert all(check.passed for check in report.verification)
    assert _run(["verify", str(out)]) == 0
    weights = out / "stages" / "6-shallow" / "model.safetensors"
    for place in (12, weights.stat().st_size - 3):  # in the header, in a tensor
        with open(weights, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        capsys.readouterr()
        assert _run(["verify", str(out)]) == 3
        assert "stages/6-shallow/model.safetensors" in capsys.readouterr().out
        with open(weights, "r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    assert _run(["verify", str(out)]) == 0


@pytest.mark.slow
def test_demo_improves_the_untaught_domains(tmp_path, capsys):
    out = tmp_path / "demo"
    assert _run(["demo", "--output-dir", str(out)]) == 0
    report = honeloom.run(shipped_path("demo"), output_dir=out)
    assert report.reused
    before, after = (
        {m.domain: m.value for m in report.metrics if m.name == f"{stage}/loss"} for stage in ("before", "after")
    )
    untaught = [d for d in before if d.endswith("+")]
    assert len(untaught) >= 6
    assert sum(after[d] < before[d] for d in untaught) >= len(untaught) - 1
    assert after["all"] < before["all"]
    assert [s["verb"] for s in report.details["stages"]] == ["evaluate", "select", "tune", "merge", "drop", "evaluate"]


def test_a_damaged_stage_is_done_again_not_reused(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nstages:\n  pick: {select: {rows: 'lab:dev', keep: 20}}\n"
        "  again: {select: {rows: $pick, keep: 10}}\n"
    )
    out = tmp_path / "run"
    honeloom.run(recipe, output_dir=out)
    good = (out / "stages" / "1-pick" / "selected.jsonl").read_bytes()
    (out / "stages" / "1-pick" / "selected.jsonl").write_bytes(good[:-2] + b"x\n")
    recipe.write_text(recipe.read_text().replace("keep: 10", "keep: 5"))
    report = honeloom.run(recipe, output_dir=out, mode="resume")
    assert (out / "stages" / "1-pick" / "selected.jsonl").read_bytes() == good
    assert report.details["stages"][1]["artefact"]["kind"] == "rows"
    assert _run(["verify", str(out)]) == 0
