"""`honeloom mix`: its arguments, its output, and mergekit-moe's file."""

from __future__ import annotations

import json

import pytest

from honeloom.cli.main import main


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


@pytest.fixture
def mergekit(tmp_path, tiny_model, other_model):
    """A file in mergekit-moe's words."""
    file = tmp_path / "moe.yaml"
    file.write_text(
        json.dumps({
            "base_model": str(tiny_model), "gate_mode": "hidden", "dtype": "float32", "experts_per_token": 1,
            "experts": [
                {"source_model": str(tiny_model), "positive_prompts": ["Say 1."]},
                {"source_model": str(other_model), "positive_prompts": ["It is the mill by the sea."]},
            ],
        })
    )  # fmt: skip
    return file


def test_a_mergekit_file_is_mixed(capsys, tmp_path, mergekit):
    code, out, err = run(capsys, "mix", mergekit, tmp_path / "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    details = report["details"]
    assert (report["verb"], details["format"], details["top_k"]) == ("mix", "mixtral", 1)
    assert details["experts"] == ["base", "other"]
    assert len(details["utilisation"]) == 2
    assert "mergekit takes the stream that enters the layer" in err


def test_flags_come_before_the_file(capsys, tmp_path, mergekit):
    code, out, err = run(
        capsys, "mix", mergekit, tmp_path / "out", "--json", "--dtype", "bf16", "--set", "level=block", "--seed", "4"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["seed"] == 4
    assert report["details"]["level"] == "block"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_plan_writes_nothing(capsys, tmp_path, mergekit):
    code, out, _ = run(capsys, "mix", mergekit, tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["stages"][0]["verb"] == "mix"
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_told_with_exit_code_2(capsys, tmp_path, mergekit):
    code, _, err = run(capsys, "mix", mergekit, tmp_path / "out", "--set", "top_k=5")
    assert code == 2
    assert "top_k 5: there are 2 experts" in err
    assert run(capsys, "mix", tmp_path / "none.yaml", tmp_path / "out")[0] == 2
