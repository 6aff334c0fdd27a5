"""Kill -9 in the middle of every stage: what is run again ends with the files of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from honeloom.config.shipped import shipped_path
from honeloom.runs.manifest import verify_folder
from run_trees import snapshot

SMALL = (
    "pick.limit=400", "central.max_steps=12", "shared.local_steps=6", "glued.limit=160", "small.samples=32",
    "small.heal_steps=8", "before.limit=160", "after.limit=160",
)  # fmt: skip


def start(out: Path, settings: Sequence[str]) -> subprocess.Popen[str]:
    sets = [part for one in settings for part in ("--set", one)]
    command = ["run", str(shipped_path("whole-loop")), *sets, "--output-dir", str(out), "--resume"]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "honeloom", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_to_the_end(out: Path, settings: Sequence[str]) -> str:
    process = start(out, settings)
    told = process.communicate(timeout=900)[0]
    assert process.returncode == 0, told
    return told


def kill_within(out: Path, settings: Sequence[str], stage: str, seconds: float) -> None:
    """Run, and kill everything a third into the stage, which must then be unfinished."""
    process = start(out, settings)
    told = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("[") and f"] {stage}: " in line:
            break
    else:
        pytest.fail("".join(told))
    time.sleep(seconds / 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert not out.exists(), "the run was over before it was killed"


def check(tmp_path: Path, settings: Sequence[str], killed: Sequence[str] | None = None) -> None:
    """Where a run lies is in its files, so the undisturbed one goes before the killed one lies there."""
    out = tmp_path / "out"
    run_to_the_end(out, settings)
    stages = json.loads((out / "report.json").read_bytes())["details"]["stages"]
    seconds = {stage["name"]: stage["seconds"] for stage in stages}
    wanted = snapshot(out)
    shutil.rmtree(out)
    for stage in killed or seconds:
        kill_within(out, settings, stage, seconds[stage])
    told = run_to_the_end(out, settings)
    assert told.count(": reused") == list(seconds).index((killed or list(seconds))[-1]), told
    assert snapshot(out) == wanted
    assert verify_folder(out)[1] == []
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_the_whole_loop_killed_in_each_stage(tmp_path):
    check(tmp_path, SMALL)


@pytest.mark.slow
def test_a_real_model_killed_while_it_is_tuned(tmp_path, shared_data):
    rows = shared_data / "instruct" / "mixed_demo.jsonl.gz"
    there = (f"model={shared_data / 'models' / 'base6m'}", f"rows={rows}", f"search={rows}", f"test={rows}")
    short = [f"{stage}.max_length=128" for stage in ("before", "central", "shared", "small", "after")]
    check(tmp_path, (*there, *SMALL, *short, "pick.limit=200", "glued.limit=60", "before.limit=60", "after.limit=60"),
          ["central"])  # fmt: skip
