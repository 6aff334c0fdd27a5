"""What differs between operating systems, and the rules of the strictest of them, held on every one."""

from __future__ import annotations

import ast
import gc
import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

import honeloom
from honeloom import system
from honeloom.config.base import validate
from honeloom.config.recipe import Recipe
from honeloom.errors import ConfigError
from honeloom.runs import manifest
from honeloom.runs.output import locate

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 1 << 30


def held_below(folder: Path) -> list[str]:
    """Files below a folder that this process has open or mapped."""
    opened = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            opened.append(os.readlink(fd))
        except FileNotFoundError:  # closed meanwhile: the one of this listing
            continue
    mapped = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    return [name for name in {*opened, *mapped} if Path(name).is_relative_to(folder)]


@pytest.fixture
def renamed(monkeypatch):
    """Names of the folders that are renamed; fails where a file below one of them is still held."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux lists the files of a process")
    real, seen = system.replace, []

    def checked(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            assert held_below(Path(source)) == [], f"Windows would refuse to rename {source}"
            seen.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(system, "replace", checked)
    gc.disable()  # what only the garbage collector closes is closed too late
    yield seen
    gc.enable()


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_held_file_is_noticed(tmp_path, renamed, how):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"x" * 5000)
    with open(tmp_path / "a/file", "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if how == "mapped" else file
        if how == "mapped":
            file.close()
        with pytest.raises(AssertionError, match="Windows would refuse"):
            system.replace(tmp_path / "a", tmp_path / "b")
        held.close()
    system.replace(tmp_path / "a", tmp_path / "b")
    assert renamed == ["b"]


def test_no_file_is_held_when_a_result_moves_into_place(tiny_model, other_model, rows, tmp_path, renamed):
    lora = honeloom.tune(tiny_model, rows, output_dir=tmp_path / "lora", max_steps=1, rank=2)
    honeloom.tune(tiny_model, rows, output_dir=tmp_path / "full", method="full", max_steps=1)
    models = {"models": [str(tiny_model), str(other_model)], "method": "linear"}
    honeloom.merge(models, tmp_path / "merged")
    honeloom.drop(tiny_model, tmp_path / "dropped", attention=1, calibration=str(rows), samples=2)
    honeloom.drop("lab:base", tmp_path / "halved", attention=1, calibration=str(rows), samples=2, dtype="bf16")
    honeloom.select(rows, output_dir=tmp_path / "picked", method="perplexity", model=str(tiny_model), keep=4)
    honeloom.evaluate(lora.out, output_dir=tmp_path / "scores", rows=str(rows), against=str(tiny_model))
    honeloom.merge(models, tmp_path / "merged", seed=1, overwrite=True)  # the old result moves aside
    assert renamed == ["lora", "full", "merged", "dropped", "halved", "picked", "scores", ".merged.old", "merged"]


def test_no_file_is_held_when_a_run_moves_into_place(tiny_model, rows, tmp_path, renamed):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nvars: {{rows: {rows}, model: {tiny_model}}}\nstages:\n"
        "  tuned: {tune: {model: $model, rows: $rows, max_steps: 1}}\n"
        "  score: {evaluate: {model: $tuned, rows: $rows, limit: 4}}\n"
    )
    honeloom.run(recipe, output_dir=tmp_path / "run")
    honeloom.run(recipe, output_dir=tmp_path / "run", set=["score.limit=3"], resume=True)
    assert renamed == ["1-tuned", "2-score", "run", "1-tuned", "2-score", ".run.old", "run"]


class Refusing:
    """An `os.replace` that is refused so many times, as while a virus scanner has the file open."""

    def __init__(self, times: int) -> None:
        self.left, self.real = times, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        if self.left:
            self.left -= 1
            raise PermissionError(13, "in use by another process")
        self.real(source, target)


@pytest.mark.parametrize(("windows", "refusals", "works"), [(True, 3, True), (True, 99, False), (False, 1, False)])
def test_a_rename_is_tried_again_for_a_moment_on_windows_only(tmp_path, monkeypatch, windows, refusals, works):
    waits = []
    monkeypatch.setattr(system, "WINDOWS", windows)
    monkeypatch.setattr(os, "replace", Refusing(refusals))
    monkeypatch.setattr(system.time, "sleep", waits.append)
    (tmp_path / "a").write_text("new")
    if works:
        system.replace(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "new"
    else:
        with pytest.raises(PermissionError):
            system.replace(tmp_path / "a", tmp_path / "b")
    assert waits == list(system.SHARING_WAITS[: min(refusals, 99)] if windows else ())
    assert sum(system.SHARING_WAITS) < 2


@pytest.mark.parametrize(
    "name", ["con", "NUL", "nul.txt", "Com1", "lpt9.tar.gz", "aux .x", "a.", "a ", "a:b", "a?", "<"]
)
def test_names_that_windows_refuses(name, monkeypatch, tmp_path):
    assert system.unportable(name)
    monkeypatch.setattr(system, "WINDOWS", True)
    with pytest.raises(ConfigError, match=r"on Windows.*choose another --output-dir"):
        locate(tmp_path / name / "out")
    monkeypatch.setattr(system, "WINDOWS", False)
    assert locate(tmp_path / name / "out") == tmp_path / name / "out"


@pytest.mark.parametrize("name", ["console", "com10", "a.b", "ünï", ".hidden", "null", "name with space"])
def test_names_that_every_system_takes(name):
    assert system.unportable(name) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["con"], "name of a device"),
        (["Lpt1"], "name of a device"),
        (["pick", "Pick"], "differs only in upper and lower case"),
        (["pick\n"], "use letters, digits"),
        (["a:b"], "use letters, digits"),
    ],
)
def test_stage_names_are_portable(names, message):
    stages = {name: {"evaluate": {}} for name in names}
    with pytest.raises(ConfigError, match=message):
        validate(Recipe, {"version": 1, "stages": stages}, what="recipe")


def memory_of(root: Path, available: int, group: str, files: dict[str, str]) -> int:
    files = {
        "proc/meminfo": f"MemTotal: {32 * GIB >> 10} kB\nMemAvailable: {available >> 10} kB\n",
        "proc/self/cgroup": group,
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return system._linux_memory(root)


def test_memory_is_what_the_tightest_control_group_leaves(tmp_path):
    assert memory_of(tmp_path / "none", 8 * GIB, "", {}) == 8 * GIB
    version2 = {
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    }
    assert memory_of(tmp_path / "v2", 8 * GIB, "0::/a/b\n", version2) == 2 * GIB
    base = "sys/fs/cgroup/memory"
    version1 = {
        f"{base}/x/memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{base}/x/memory.usage_in_bytes": f"{GIB}\n",
        f"{base}/x/memory.stat": "total_inactive_file 0\n",
        f"{base}/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
    }
    assert memory_of(tmp_path / "v1", 8 * GIB, "4:cpu,memory:/x\n0::/\n", version1) == GIB
    assert memory_of(tmp_path / "tight", GIB // 2, "4:cpu,memory:/x\n", version1) == GIB // 2


def test_memory_of_this_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < system.available_memory() <= total
    assert system.peak_rss() > 1 << 20


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_is_whole_even_where_the_kernel_stops_midway(tmp_path, monkeypatch, fails):
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    if fails and hasattr(os, "copy_file_range"):
        real, calls = os.copy_file_range, []

        def partial(source: int, target: int, count: int) -> int:
            calls.append(count)
            if len(calls) > 1:
                raise OSError(18, "Invalid cross-device link")
            return real(source, target, 1_000_000)

        monkeypatch.setattr(os, "copy_file_range", partial)
    system.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data


def test_hashing_leaves_the_page_cache_only_for_files_that_would_fill_it(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(1000))
    whole = manifest.sha256_file(tmp_path / "a")
    dropped = []
    monkeypatch.setattr(manifest, "forget_pages", lambda fd, start, length: dropped.append((start, length)))
    monkeypatch.setattr(manifest, "_PIECE", 300)
    manifest.sha256_file(tmp_path / "a")
    assert dropped == []
    monkeypatch.setattr(manifest, "_LARGE", 1000)
    monkeypatch.setattr(manifest, "available_memory", lambda: 1999)
    assert manifest.sha256_file(tmp_path / "a") == whole
    assert dropped == [(0, 300), (300, 300), (600, 300), (900, 100)]
    system.forget_pages(os.open(tmp_path / "a", os.O_RDONLY), 0, 1000)  # the system takes the call


def test_a_limit_of_the_address_space_holds_and_is_lifted():
    code = (
        "from honeloom.system import address_space_limit\n"
        "with address_space_limit(64 << 20):\n"
        "    try: bytearray(512 << 20)\n"
        "    except MemoryError: print('held')\n"
        "print(len(bytearray(512 << 20)))"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells a process its address space")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["held", str(512 << 20)]


def test_only_one_module_knows_the_system():
    spec = importlib.util.spec_from_file_location("check_structure", REPOSITORY / "scripts" / "check_structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = "def f():\n    import fcntl\n    from sys import platform\n    return os.name, sys.platform, os.path\n"
    assert sorted(module.platform_uses(ast.parse(code))) == [
        (2, "fcntl"), (3, "sys.platform"), (4, "os.name"), (4, "sys.platform"),
    ]  # fmt: skip
