"""`honeloom aggregate`: streams, plans, reuse, exit codes."""

from __future__ import annotations

import json

import pytest
from adapter_folders import CONFIG, WEIGHTS, edit_weights, make_adapter

import honeloom
from honeloom.cli.main import main
from honeloom.errors import ConfigError
from honeloom.federated.config import AggregateConfig
from honeloom.runs.manifest import verify_folder


@pytest.fixture
def run(capsys):
    """Run the command line; returns exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def adapters(tmp_path, tiny_model):
    return [make_adapter(tiny_model, tmp_path / n, s, r=r) for s, (n, r) in enumerate((("a", 4), ("b", 2)))]


def test_weights_may_be_a_text_or_numbers():
    for weights in ("50,30", [50, 30], (50.0, 30.0)):
        assert AggregateConfig(adapters=["a", "b"], weights=weights).shares() == (0.625, 0.375)
    assert AggregateConfig(adapters=["a", "b", "c", "d"]).shares() == (0.25,) * 4
    assert AggregateConfig(adapters="a").method.type == "svd"


def test_the_command_plans_writes_and_reuses(run, adapters, tmp_path):
    out = tmp_path / "out"
    command = ("aggregate", *adapters, "--weights", "3,1", "--rank", "3", "--output-dir", out)
    code, printed, _ = run(*command, "--dry-run", "--json")
    (plan,) = json.loads(printed)["stages"]
    assert code == 0 and plan["state"] == "run" and not out.exists()
    assert plan["config"]["method"] == {"type": "svd", "rank": 3, "energy": None}
    assert plan["inputs"] == {"adapters.0": str(adapters[0]), "adapters.1": str(adapters[1])}
    code, printed, _ = run(*command, "--json")
    assert code == 0 and json.loads(printed) == json.loads((out / "report.json").read_bytes())
    code, printed, _ = run(*command)
    assert code == 0 and "aggregate: reused" in printed and printed.splitlines()[-1] == str(out)
    code, _, err = run("aggregate", *adapters, "--method", "flora", "--output-dir", out)
    assert code == 2 and "--overwrite" in err
    assert run("aggregate", *adapters, "--method", "flora", "--output-dir", out, "--overwrite")[0] == 0
    held = {p.name for p in out.iterdir()}
    assert held - {"report.html"} == {
        CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "report.json", "recipe.lock.yaml", "inputs.json",
        "environment.json", "events.jsonl", "README.md", "manifest.json",
    } - ({"tokenizer.json", "tokenizer_config.json"} - held)  # fmt: skip
    assert verify_folder(out)[1] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--weights", "1,2,3"), "3 numbers for 2 adapters"),
        (("--weights", "1,0"), "0.0 is not a positive number"),
        (("--weights", "1,x"), "one number per adapter, like 50,30,20"),
        (("--method", "flroa"), "did you mean 'flora'"),
        (("--method", "flora", "--rank", "3"), "method 'flora' has no setting 'rank'"),
        (("--rank", "0"), "greater than or equal to 1"),
        (("--energy", "1.5"), "less than or equal to 1"),
        (("--method", "fedit"), "all ranks must be equal; they are [4, 2]"),
        (("--method", "ffa"), "one frozen A for all clients"),
        (("--into-base", "nothing/here/at-all"), "no such folder"),
    ],
)
def test_what_the_user_can_mend(run, adapters, tmp_path, flags, message):
    code, _, err = run("aggregate", *adapters, "--output-dir", tmp_path / "out", *flags)
    assert code == 2
    assert message in err or message.replace("[4, 2]", "[2, 4]") in err, err
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_ends_with_1_and_a_missing_one_with_2(run, adapters, tmp_path):
    out = tmp_path / "out"
    code, _, err = run("aggregate", adapters[0], tmp_path / "nothing", "--output-dir", out)
    assert code == 2 and "no such folder" in err
    edit_weights(adapters[1], lambda ts: next(iter(ts.values())).fill_(float("nan")))
    code, _, err = run("aggregate", *adapters, "--output-dir", out)
    assert code == 1 and f"{adapters[1] / WEIGHTS}: tensor" in err
    (adapters[1] / WEIGHTS).write_bytes((adapters[1] / WEIGHTS).read_bytes()[:-10])
    code, _, err = run("aggregate", *adapters, "--output-dir", out)
    assert code == 2 and "truncated" in err
    (adapters[1] / WEIGHTS).rename(adapters[1] / "adapter_model.bin")
    code, _, err = run("aggregate", *adapters, "--output-dir", out)
    assert code == 2 and "pickle" in err


def test_python_needs_an_output_folder(adapters):
    with pytest.raises(ConfigError, match="output folder"):
        honeloom.aggregate(adapters, output_dir=None)


def test_a_result_that_is_not_the_sum_is_not_published(run, adapters, tmp_path, monkeypatch):
    from honeloom.federated.aggregation import flora as module
    from honeloom.types.updates import Combined

    right = module.flora
    monkeypatch.setattr(module, "flora", lambda parts: Combined(right(parts).b * 1.0001, right(parts).a))
    code, _, err = run("aggregate", *adapters, "--method", "flora", "--output-dir", tmp_path / "out")
    assert code == 3 and "nothing was published" in err
    assert not (tmp_path / "out").exists()
