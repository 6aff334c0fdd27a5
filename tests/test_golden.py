"""The public surface, frozen: names, flags and the keys of the files that every output carries.

After an intended change run `HONELOOM_WRITE_GOLDEN=1 pytest tests/test_golden.py`, and say why in the commit.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import typer.main

import honeloom
from goldens import check, check_json
from honeloom.cli.main import app
from honeloom.registry import load_target
from honeloom.verbs import VERBS


def test_public_api():
    assert sorted(honeloom.__all__) == dir(honeloom)
    for name in honeloom.__all__:
        assert getattr(honeloom, name) is not None
    check("public_api.txt", "".join(f"{name}\n" for name in sorted(honeloom.__all__)))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        honeloom.nothing


def test_every_public_function_is_documented():
    for name in set(honeloom.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(honeloom, name))


def _commands() -> dict[str, Any]:
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        children = getattr(command, "commands", None)
        parts = {f"{name} {k}": c for k, c in children.items()} if children else {name: command}
        found.update(parts)
    return found


def test_cli_flags():
    flags = {
        name: sorted(option for p in command.params for option in (p.opts if p.param_type_name == "option" else ()))
        for name, command in _commands().items()
    }
    arguments = {
        name: [p.name for p in command.params if p.param_type_name == "argument"]
        for name, command in _commands().items()
    }
    check_json("cli_flags.json", {name: {"arguments": arguments[name], "flags": flags[name]} for name in flags})


def test_every_flag_has_help():
    for name, command in _commands().items():
        assert command.help, name
        for p in command.params:
            assert p.param_type_name == "argument" or p.help, (name, p.name)


def test_settings_of_every_verb():
    schemas = {name: sorted(load_target(verb.config).model_fields) for name, verb in VERBS.items()}
    check_json("verb_settings.json", schemas)


def _keys(value: Any) -> Any:
    """The shape of a document: keys of objects, the shape of a list's first item, type names of the rest."""
    if isinstance(value, dict):
        return {k: _keys(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_keys(value[0])] if value else []
    return type(value).__name__


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, other_model):
    root = tmp_path_factory.mktemp("golden")
    rows = root / "rows.jsonl"
    line = '{{"id": "r{0}", "instruction": "Say {0}.", "input": "", "output": "It is {0}.", "domain": "a"}}\n'
    rows.write_text("".join(line.format(i) for i in range(6)))
    (root / "recipe.yaml").write_text(
        f"""version: 1
stages:
  pick: {{select: {{rows: {rows}, keep: 50%}}}}
  merged: {{merge: {{models: [{tiny_model}, {other_model}]}}}}
  score: {{evaluate: {{model: $merged, rows: $pick, against: {tiny_model}}}}}
"""
    )
    honeloom.run(root / "recipe.yaml", output_dir=root / "out")
    return root / "out"


@pytest.mark.parametrize("name", ["report.json", "inputs.json"])
def test_keys_of_the_side_files(finished, name):
    places = {"run": finished, **{s: finished / "stages" / s for s in ("1-pick", "2-merged", "3-score")}}
    check_json(name, {place: _keys(json.loads((folder / name).read_bytes())) for place, folder in places.items()})


def test_keys_of_the_manifest(finished):
    documents = {p: json.loads((finished / p / "manifest.json").read_bytes()) for p in (".", "stages/1-pick")}
    shapes = {place: {**_keys(d), "files": _keys(list(d["files"].values()))} for place, d in documents.items()}
    check_json("manifest.json", shapes)


def test_every_output_has_the_side_files_and_its_artefact(finished):
    beside = {"report.json", "recipe.lock.yaml", "inputs.json", "environment.json", "events.jsonl", "README.md"}
    wanted = {
        "1-pick": {"selected.jsonl", "rejected.parquet", "scores.parquet", "clusters.parquet", "evaluations.jsonl"},
        "2-merged": {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "merge.yaml"},
        "3-score": {"examples.parquet"},
    }
    for stage, artefact in wanted.items():
        held = {p.name for p in (finished / "stages" / stage).iterdir()}
        assert held - {"report.html", "generation_config.json"} == beside | artefact | {"manifest.json"}
    held = {p.name for p in finished.iterdir()}
    assert held - {"report.html"} == beside | {"manifest.json", "stages"}


def test_a_locked_recipe_runs_again_to_the_same_keys(finished, tmp_path):
    first = honeloom.plan("run", recipe=finished / "recipe.lock.yaml", output_dir=finished)
    assert [p.state for p in first] == ["reuse"] * 3
    stage = honeloom.plan("run", recipe=finished / "stages/1-pick/recipe.lock.yaml", output_dir=tmp_path / "x")
    assert stage[0].key == first[0].key
