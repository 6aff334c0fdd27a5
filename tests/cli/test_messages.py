"""What a person reads when a call is wrong, and on the way: the thing, its value, what is allowed, the next step."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import typer.main
from rich.console import Console

import honeloom
from honeloom.cli.main import app
from honeloom.cli.terminal import Terminal
from honeloom.config.methods import MethodConfig
from honeloom.flags import FLAGS
from honeloom.registry import family, load_target
from honeloom.verbs import VERBS

ROOT: Any = typer.main.get_command(app)


def commands():
    for name, command in ROOT.commands.items():
        children = getattr(command, "commands", {})
        yield from ((f"{name} {k}", c) for k, c in children.items()) if children else [(name, command)]


def test_every_command_has_an_example_that_it_can_read(cli):
    for name, command in commands():
        example = re.search(rf"^Example: honeloom ({name}.*)$", command.help, re.MULTILINE)
        assert example, name
        words = example[1].split()[len(name.split()) :]
        command.make_context(name, list(words), resilient_parsing=False)
        assert f"  Example: honeloom {example[1]}" in cli(*name.split(), "--help").out.splitlines(), name


def test_the_list_of_commands_is_not_cut(cli):
    text = cli("--help").out
    assert "..." not in text.replace("[ARGS]...", "")
    for line in text.partition("Commands:\n")[2].splitlines():
        assert line.endswith("."), line


def stated_default(help_text: str) -> str | None:
    found = re.search(r"\[default: (.+)\]$", help_text)
    return found[1] if found else None


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "merge"])
def test_stated_defaults_are_those_of_the_settings(verb):
    """Flags that are None until given say their default in words; it is that of the settings."""
    fields = load_target(VERBS[verb].config).model_fields
    said = 0
    for parameter in ROOT.commands[verb].params:
        stated = stated_default(parameter.help or "") if parameter.param_type_name == "option" else None
        path = FLAGS.get(verb, {}).get(parameter.name, parameter.name).split(".")
        if stated is None or parameter.default is not None or path[0] not in fields:
            continue
        value = fields[path[0]].get_default(call_default_factory=True)
        if of_method := re.match(r"Of method (\w+)", parameter.help):
            value = family(VERBS[verb].family).load_config(of_method[1])()
        for part in path[1:]:
            value = getattr(value, part)
        words = {
            None: (
                "all",
                "no",
                "the model's",
                "the method's",
                "the largest adapter's",
                "equal",
                "1",
                "16, or by --energy",
                "inter; search: both",
                "2e-4 lora, 2e-5 full",
                "the model's limit, at most 2048",
                "all parts",
                "unknown",
                "the search's",
                "no limit",
                "one per core",
            )
        }
        assert stated in words.get(value, (str(value),)) if not isinstance(value, MethodConfig) else False, (
            parameter.name
        )
        said += 1
    assert said >= {"convert": 1, "export": 4}.get(verb, 5)


def test_wrong_calls_are_told_with_the_next_step(cli):
    done = cli("tun")
    assert done.err.splitlines()[0] == "error: no such command 'tun'; did you mean 'tune' or 'run'?"
    done = cli("tune", "lab:base", "lab:dev", "--rnak", "3")
    assert done.err.splitlines() == [
        "error: no such option '--rnak'; did you mean '--rank' or '--lr'?",
        "  usage: honeloom tune [OPTIONS] MODEL ROWS...",
        "  example: honeloom tune org/model rows.jsonl --rank 16 --epochs 3 --output-dir tuned",
        "  help: honeloom tune --help",
    ]
    assert cli("tune").err.startswith("error: MODEL is missing: Hub id, id@rev, path or lab:base\n")
    assert cli("rows", "preview", "x.jsonl").err.startswith("error: --model is missing: The model whose tokenizer")
    for done in (cli("tune"), cli("tun"), cli("tune", "a", "b", "--rank", "x")):
        assert (done.code, done.out) == (2, "")


def test_a_token_in_a_wrong_call_is_not_repeated(cli):
    secret = "hf_" + "a" * 34
    assert secret not in cli("tune", f"--{secret}").err
    assert secret not in cli("tune", "lab:base", "lab:dev", "--rank", secret).err


CASES = {
    ("--split", "0.8"): "split: a split is START-STOP with 0 <= START < STOP <= 1, for example 0-0.8 (got '0.8')",
    ("--device", "gpu"): "device: use auto, cpu, cuda, cuda:N (the GPU number N) or mps (got 'gpu')",
    ("--dtype", "bf17"): "dtype: must be 'auto', 'bf16', 'fp16' or 'fp32' (got 'bf17'); did you mean 'bf16'",
    ("--limit", "-1"): "limit: must be greater than 0 (got -1)",
    ("--rank", "0"): "tune: method.rank: must be greater than 0 (got 0)",
    ("--set", "optimizer.weigth_decay=1"): "unknown key 'optimizer.weigth_decay'; did you mean 'weight_decay'?",
    ("--report-to", "wandbb"): "report_to.0: must be 'trackio', 'wandb', 'mlflow' or 'tensorboard' (got 'wandbb')",
    ("--load-in", "4"): "load_in: must be '4bit' or '8bit' (got '4')",
    ("--max-length", "2"): "has anything to train within 2 tokens; look at them with `honeloom rows preview`",
}


@pytest.mark.parametrize(("flags", "message"), CASES.items(), ids=str)
def test_a_wrong_value_is_told_as_it_was_written(cli, tmp_path, tiny_model, rows, flags, message):
    done = cli("tune", tiny_model, rows, "--output-dir", tmp_path / "out", *flags)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_one_module_is_a_list_of_one(tmp_path, tiny_model, rows):
    with pytest.raises(honeloom.errors.ConfigError, match=r"\('q_prj',\).*all-linear"):
        honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, set=["method.targets=q_prj"])
    report = honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, set=["method.targets=q_proj"])
    assert report.status == "ok"


def test_other_messages_name_the_value_and_what_is_allowed(cli, tmp_path, tiny_model, rows):
    out = ("--output-dir", tmp_path / "out")
    keep = cli("select", rows, "--keep", "0", *out).err
    assert "whole numbers above 0 (got '0')" in keep
    assert "unknown selection method 'zzz' (known: random, " in cli("select", rows, "--method", "zzz", *out).err
    assert "missing key 'calibration' (Rows on which importance is measured)" in cli("drop", tiny_model, *out).err
    (tmp_path / "merge.yaml").write_text("models: []")
    assert (
        "give models, or slices; one of the two must not be empty"
        in cli("merge", tmp_path / "merge.yaml", tmp_path / "out").err
    )
    (tmp_path / "empty.jsonl").touch()
    assert "(0 rows read); give a file that holds rows" in cli("select", tmp_path / "empty.jsonl", *out).err
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.safetensors").touch()
    assert "no config.json or adapter_config.json" in cli("evaluate", tmp_path / "half", "--rows", rows).err
    done = cli("lineage", tmp_path / "nothing")
    assert "no such folder; give the one that --output-dir named" in done.err
    done = cli("verify", tmp_path / "half")
    assert (done.code, "found None" in done.out) == (3, False)


def test_a_folder_that_cannot_be_written_is_named(cli, rows):
    done = cli("select", rows, "--output-dir", "/proc/nothing")
    assert done.code == 2
    assert done.err.startswith("error: /proc/nothing: nothing can be written in /proc (")
    assert "choose another --output-dir" in done.err


def test_the_page_is_named_before_the_folder(cli, tmp_path, rows):
    lines = cli("select", rows, "--keep", "50%", "--output-dir", tmp_path / "out").out.splitlines()
    assert lines[-2:] == [f"report: {tmp_path / 'out' / 'report.html'}", str(tmp_path / "out")]


def test_the_demo_says_at_once_that_it_needs_an_extra(cli, tmp_path, monkeypatch):
    from honeloom.runs import environment

    monkeypatch.setattr(environment, "installed_version", lambda name: None)
    done = cli("demo", "--output-dir", tmp_path / "demo")
    assert (done.code, done.err) == (
        2, "error: the demo tunes, and peft is not installed: pip install 'honeloom[tune]'\n",
    )  # fmt: skip


def test_progress_shows_count_rate_and_time_left(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Tty()
    clock = iter(range(0, 10_000))
    monkeypatch.setattr("sys.stderr", screen)
    terminal = Terminal()
    terminal.err = Console(
        file=screen, force_terminal=True, width=100, get_time=lambda: float(next(clock)), color_system=None
    )
    with terminal.progress("tune", 40) as advance:
        for _ in range(20):
            advance(1)
    shown = screen.getvalue()
    assert re.search(r"tune .*20/40 .*(/s|s each) .*\d:\d\d:\d\d left", shown)
