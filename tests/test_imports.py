"""Import budgets: what is light stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import honeloom

HEAVY = {"torch", "transformers", "numpy", "pydantic", "rich", "pyarrow", "scipy", "sklearn", "peft", "datasets", "ray"}
ENGINES = {"torch", "transformers", "peft", "accelerate", "datasets", "ray", "flwr", "lm_eval"}
RUN = """
import sys
try:
    {code}
except SystemExit as stopped:
    code = stopped.code
else:
    code = 0
import json
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def modules_after(code: str, *arguments: object) -> tuple[set[str], str]:
    """Names of the modules that a fresh interpreter holds after running code, and what it printed."""
    command = [sys.executable, "-c", RUN.format(code=code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
    status, names = json.loads(done.stderr.splitlines()[-1])
    assert status == 0, done
    return set(names), done.stdout


def command(*arguments: object) -> tuple[set[str], str]:
    return modules_after("from honeloom.cli.main import main; main(sys.argv[1:])", *arguments)


def test_importing_the_package_loads_nothing_heavy():
    before, _ = modules_after("pass")
    names, printed = modules_after(
        "import honeloom; print(sorted(honeloom.__all__) == dir(honeloom), honeloom.__version__)"
    )
    assert not HEAVY & names
    assert {n.split(".")[0] for n in names - before} <= {"honeloom", *sys.stdlib_module_names}
    assert printed == f"True {honeloom.__version__}\n"


def test_help_is_light():
    names, printed = command("--help")
    assert "evaluate" in printed
    assert not HEAVY & names
    before, _ = modules_after("pass")
    assert len(names - before) <= 200


def test_help_of_a_command_is_light():
    names, printed = command("select", "--help")
    assert "--near-duplicates" in printed
    assert not HEAVY & names


def test_methods_loads_no_engine():
    names, printed = command("methods")
    assert "task_arithmetic" in printed
    assert not ENGINES & names


@pytest.fixture
def finished(tmp_path, rows, tiny_model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""version: 1
stages:
  pick: {{select: {{rows: {rows}, keep: 50%}}}}
  score: {{evaluate: {{model: {tiny_model}, rows: $pick}}}}
"""
    )
    honeloom.run(recipe, output_dir=tmp_path / "out")
    return recipe, tmp_path / "out"


def test_plans_reuse_and_checks_load_no_engine(finished, tmp_path, rows, tiny_model):
    recipe, out = finished
    names, printed = command("run", recipe, "--output-dir", tmp_path / "other", "--dry-run", "--json")
    assert [s["state"] for s in json.loads(printed)["stages"]] == ["run", "run"]
    assert not ENGINES & names
    names, printed = command("evaluate", tiny_model, "--rows", rows, "--dry-run", "--json")
    assert json.loads(printed)["stages"][0]["state"] == "run"
    assert not ENGINES & names
    names, printed = command("run", recipe, "--output-dir", out)
    assert "score: reused" in printed
    assert not ENGINES & names
    names, printed = command("verify", out)
    assert "0 problems" in printed
    assert not ENGINES & names
    names, printed = command("lineage", out, "--row", "r1")
    assert "  row r1: " in printed
    assert not ENGINES & names


def test_plain_models_need_no_extra(tmp_path, rows, tiny_model):
    """Without peft, accelerate, datasets and bitsandbytes a model is scored on; tune names the extra."""
    bare = "for n in ('peft', 'accelerate', 'datasets', 'bitsandbytes'): sys.modules[n] = None\n"
    code = f"{bare}from honeloom.cli.main import main; main(sys.argv[1:])"

    def run(*arguments):
        command = [sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out = tmp_path / "out"
    done = run("select", rows, "--method", "ifd", "--model", tiny_model, "--keep", "50%", "--output-dir", out)
    assert done.returncode == 0, done.stderr
    done = run("tune", tiny_model, rows, "--output-dir", tmp_path / "tuned")
    assert (done.returncode, "pip install 'honeloom[tune]'" in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
