"""Python takes the names of the flags, and both put them at the same place in the settings."""

from __future__ import annotations

import inspect

import pytest
import typer.main

import honeloom
from honeloom.cli.main import app
from honeloom.config.load import dump_yaml
from honeloom.errors import ConfigError
from honeloom.flags import FLAGS, place_flags
from honeloom.registry import load_target
from honeloom.verbs import VERBS


def test_a_name_and_its_settings_meet():
    wanted = {"method": {"type": "lora", "rank": 8}}
    assert place_flags("tune", {"method": "lora", "rank": 8}) == wanted
    assert place_flags("tune", {"rank": 8, "method": {"type": "lora", "rank": 4}}) == wanted
    assert place_flags("tune", {"rank": 8, "method": None}) == {"method": {"rank": 8}}
    assert place_flags("tune", wanted) == wanted
    assert place_flags("select", {"method": "length", "keep": "5%"}) == {"method": {"type": "length"}, "keep": "5%"}
    with pytest.raises(ConfigError, match="rank cannot be added to method=3"):
        place_flags("tune", {"method": 3, "rank": 8})


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_a_verb_is_known_to_its_function(verb):
    """What is no setting is in the table of flags, a parameter of the function, or a word about the command itself."""
    command = typer.main.get_command(app).commands[verb]
    function = getattr(honeloom, verb.replace("-", "_"))
    known = {
        *load_target(VERBS[verb].config).model_fields, *FLAGS.get(verb, {}),
        *inspect.signature(function).parameters, "overwrite", "resume", "set_", "out", "push_to_hub",
    }  # fmt: skip
    planned = {"dry_run", *inspect.signature(honeloom.plan).parameters}
    assert {p.name for p in command.params} - {"json"} - planned <= known


def test_rank_in_python():
    (plan,) = honeloom.plan("tune", model="lab:base", rows="lab:dev", rank=3, optimizer="sgd")
    assert (plan.config["method"]["rank"], plan.config["optimizer"]["type"]) == (3, "sgd")
    (plan,) = honeloom.plan("tune", model="lab:base", rows="lab:dev", method="lora", rank=3, set=["method.rank=5"])
    assert plan.config["method"]["rank"] == 5


def test_overwrite_and_resume_in_python(tmp_path, rows):
    out = tmp_path / "out"
    honeloom.select(rows, method="stratified", output_dir=out)
    honeloom.select(rows, output_dir=out, resume=True, keep="50%")
    (out / "mine").mkdir()
    assert not honeloom.select(rows, output_dir=out, overwrite=True, keep="50%").reused
    assert not (out / "mine").exists()
    with pytest.raises(ConfigError, match="exclude each other"):
        honeloom.select(rows, output_dir=out, overwrite=True, resume=True)


def test_run_takes_seed_overwrite_and_resume(tmp_path, rows):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nstages:\n  pick: {{select: {{rows: {rows}}}}}\n")
    assert honeloom.run(recipe, output_dir=tmp_path / "out", seed=7).seed == 7
    assert honeloom.plan("run", recipe=recipe, seed=3)[0].config["seed"] == 3
    assert honeloom.run(recipe, output_dir=tmp_path / "out", resume=True).seed == 0
    with pytest.raises(ConfigError, match="exclude each other"):
        honeloom.run(recipe, output_dir=tmp_path / "out", resume=True, overwrite=True)


def test_a_merge_is_planned_from_its_file(tmp_path, tiny_model, other_model):
    file = tmp_path / "m.yaml"
    file.write_text(dump_yaml({"models": [str(tiny_model), str(other_model)], "method": "slerp"}))
    for config in (file, str(file), {"models": [str(tiny_model), str(other_model)], "method": "slerp"}):
        (plan,) = honeloom.plan("merge", config=config, seed=2)
        assert (plan.config["method"]["type"], plan.config["seed"]) == ("slerp", 2)


def test_a_setting_is_no_word_about_the_command(tmp_path, tiny_model):
    """A key of merge's file is a setting, even where a parameter of the function has its name."""
    with pytest.raises(ConfigError, match="unknown key 'overwrite'"):
        honeloom.merge({"models": [str(tiny_model)], "overwrite": True}, tmp_path / "out")
