"""The built wheel, installed outside the clone: complete, and enough for the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from honeloom import __version__

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: object, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the clone as it stands; `make setup` installs what builds it."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, REPOSITORY, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; it finds the dependencies here, and nothing of the clone."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A .pth line adds a folder without reading the .pth files in it: the clone's editable install stays out.
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_what_runs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    source = REPOSITORY / "src"
    skipped = ("__pycache__", ".pyc")
    wanted = {p.relative_to(source).as_posix() for p in (source / "honeloom").rglob("*") if p.is_file()}
    wanted = {n for n in wanted if not any(s in n for s in skipped)}
    assert {n for n in names if not n.startswith(f"honeloom-{__version__}.dist-info/")} == wanted
    assert {
        "honeloom/py.typed", "honeloom/lab/base/model.safetensors", "honeloom/reporting/templates/report.html",
        "honeloom/recipes/demo.yaml", "honeloom/cli/recipe_template.yaml",
    } <= names  # fmt: skip
    assert f"honeloom-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_installed_package_is_the_wheel_s(place):
    code = "import honeloom, sys, json; print(json.dumps([honeloom.__file__, sys.path]))"
    file, path = json.loads(run(place / "venv/bin/python", "-c", code, cwd=place))
    assert Path(file).is_relative_to(place / "venv")
    assert not [p for p in path if Path(p) in (REPOSITORY, REPOSITORY / "src")]


def test_commands_run_outside_the_clone(place):
    honeloom = place / "venv/bin/honeloom"
    assert run(honeloom, "--version", cwd=place).strip() == __version__
    assert "perplexity" in run(honeloom, "methods", cwd=place)
    assert json.loads(run(honeloom, "doctor", "--json", cwd=place))["packages"]["honeloom"] == __version__
    run(honeloom, "init", cwd=place)
    assert "$schema" in json.loads((place / "recipe.schema.json").read_text())


def test_the_demo_runs_outside_the_clone(place):
    out = run(place / "venv/bin/honeloom", "demo", cwd=place, HF_HUB_OFFLINE="1", HF_HOME=str(place / "cache"))
    assert out.splitlines()[-1] == str(place / "demo-run")
    report = json.loads((place / "demo-run/report.json").read_text())
    assert report["status"] == "ok"
    assert (place / "demo-run/report.html").exists()
