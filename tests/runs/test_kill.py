"""Kill -9 at every durable change: the next run ends with the bytes of an uninterrupted one and leaves no litter."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import honeloom
from honeloom.errors import HoneloomError
from honeloom.runs import atomic
from honeloom.runs.manifest import verify_folder
from honeloom.runs.output import is_complete
from run_trees import snapshot

KILLED = 137


def in_fork(work: Callable[[], Any]) -> int:
    """Run in a child process; its exit status (1 with a traceback where it raised)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def observe(nth: int | None) -> list[str]:
    """Count commit points; at the n-th (from 0) the process dies at once."""
    seen: list[str] = []

    def observer(label: str) -> None:
        if len(seen) == nth:
            os._exit(KILLED)
        seen.append(label)

    atomic.observers[:] = [observer]
    return seen


@pytest.fixture(autouse=True)
def _fast_and_unobserved(monkeypatch):
    """No page (megabytes of one library; report.json has its content), and no flush: a kill loses no written byte."""
    monkeypatch.setattr("honeloom.reporting.page.write_page", lambda folder, report: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    yield
    atomic.observers.clear()


class Scene:
    """A recipe, where it runs, and what the folder held before."""

    def __init__(self, root: Path, recipe: str, before: str | None = None) -> None:
        self.place = root / "place"
        self.out = self.place / "out"
        self.recipe, self.before = root / "recipe.yaml", root / "before.yaml"
        self.recipe.write_text(recipe)
        self.start = root / "start"
        self.start.mkdir()
        if before is not None:
            self.before.write_text(before)
            self.reset()
            honeloom.run(self.before, output_dir=self.out)
            self.start.rmdir()
            self.place.rename(self.start)

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.start, self.place)

    def run(self) -> None:
        honeloom.run(self.recipe, output_dir=self.out, mode="resume")

    def straight(self) -> tuple[dict[str, str], list[str]]:
        """What an uninterrupted run leaves, and its commit points."""
        self.reset()
        seen = observe(None)
        self.run()
        labels = list(seen)
        atomic.observers.clear()
        assert verify_folder(self.out)[1] == []
        return snapshot(self.out), labels

    def killed_at(self, nth: int) -> None:
        self.reset()

        def work() -> None:
            observe(nth)
            self.run()

        assert in_fork(work) == KILLED

    def finish(self) -> None:
        assert in_fork(self.run) == 0


def check_every_kill(scene: Scene, every: int = 1) -> None:
    wanted, labels = scene.straight()
    assert len(labels) > 30
    for nth in range(0, len(labels), every):
        scene.killed_at(nth)
        if scene.before.exists():
            assert is_complete(scene.out) or is_complete(scene.place / ".out.old"), labels[nth]
        scene.finish()
        assert snapshot(scene.out) == wanted, (nth, labels[nth])
        assert os.listdir(scene.place) == ["out"], (nth, labels[nth])
        assert verify_folder(scene.out)[1] == [], (nth, labels[nth])


def two_selections(rows: Path, keep: int) -> str:
    return f"""version: 1
stages:
  pick: {{select: {{rows: {rows}, keep: 50%}}}}
  fewer: {{select: {{rows: $pick, method: stratified, keep: {keep}}}}}
"""


@pytest.fixture
def with_models(rows, tiny_model, other_model) -> str:
    return f"""version: 1
stages:
  pick: {{select: {{rows: {rows}, keep: 50%}}}}
  merged: {{merge: {{models: [{tiny_model}, {other_model}], method: slerp}}}}
  score: {{evaluate: {{model: $merged, rows: $pick}}}}
"""


@pytest.mark.slow
def test_two_selections_killed_at_every_commit_point(tmp_path, rows):
    check_every_kill(Scene(tmp_path, two_selections(rows, 2)))


@pytest.mark.slow
def test_a_sweep_killed_at_every_eleventh_commit_point(tmp_path, rows):
    """Two of its points share a stage, whose settings come out the same."""
    check_every_kill(Scene(tmp_path, f"{two_selections(rows, 2)}sweep: {{pick.keep: [50%, 6]}}\n"), every=11)


@pytest.mark.slow
def test_a_replaced_run_killed_at_every_commit_point(tmp_path, rows):
    check_every_kill(Scene(tmp_path, two_selections(rows, 2), before=two_selections(rows, 3)))


@pytest.mark.slow
def test_a_taken_over_run_killed_at_every_commit_point(tmp_path, rows):
    """An interrupted run of another recipe lies beside OUT; its matching stage is used whenever the process dies."""
    scene = Scene(tmp_path, two_selections(rows, 2), before=two_selections(rows, 3))
    scene.before.unlink()
    (scene.start / "out").rename(scene.start / ".out.partial-0123456789abcdef")
    check_every_kill(scene)
    assert scene.straight()[1].count("rename 1-pick") == 0


def test_of_two_interrupted_runs_the_one_with_more_stages_is_taken_over(tmp_path, rows):
    scene = Scene(tmp_path, two_selections(rows, 2), before=two_selections(rows, 3))
    scene.before.unlink()
    (scene.start / "out").rename(scene.start / ".out.partial-0123456789abcdef")
    empty = scene.start / ".out.partial-fedcba9876543210"
    (empty / "stages").mkdir(parents=True)
    os.utime(empty, (time.time() + 60, time.time() + 60))  # the later one
    assert scene.straight()[1].count("rename 1-pick") == 0


def test_merge_and_evaluate_killed_at_every_twentieth_commit_point(tmp_path, with_models):
    check_every_kill(Scene(tmp_path, with_models), every=20)


@pytest.mark.slow
def test_merge_and_evaluate_killed_at_every_commit_point(tmp_path, with_models):
    check_every_kill(Scene(tmp_path, with_models))


def test_two_kills_in_a_row(tmp_path, rows):
    scene = Scene(tmp_path, two_selections(rows, 2))
    wanted, labels = scene.straight()
    for first in range(0, len(labels), 9):
        scene.killed_at(first)

        def again() -> None:
            observe(3)
            scene.run()

        in_fork(again)
        scene.finish()
        assert snapshot(scene.out) == wanted
        assert os.listdir(scene.place) == ["out"]


def test_the_finished_stage_is_not_run_again(tmp_path, rows):
    scene = Scene(tmp_path, two_selections(rows, 2))
    _, labels = scene.straight()
    first_end = labels.index("rename 1-pick")
    scene.killed_at(first_end + 5)
    (partial,) = scene.place.glob(".out.partial-*")
    before = (partial / "stages" / "1-pick" / "scores.parquet").stat().st_mtime_ns
    scene.finish()
    assert (scene.out / "stages" / "1-pick" / "scores.parquet").stat().st_mtime_ns == before


def full_disk(nth: int) -> list[str]:
    seen: list[str] = []

    def observer(label: str) -> None:
        seen.append(label)
        if len(seen) > nth:
            raise OSError(errno.ENOSPC, "No space left on device", label)

    atomic.observers[:] = [observer]
    return seen


def test_a_full_disk_at_every_write_of_a_verb_leaves_the_old_result_and_no_temporary(tmp_path, rows):
    out = tmp_path / "place" / "out"
    honeloom.select(rows, output_dir=out)
    old = snapshot(out)
    seen = observe(None)
    honeloom.select(rows, output_dir=tmp_path / "count" / "out", seed=1)
    writes = [i for i, label in enumerate(seen) if label not in ("rename .out.old", "rename out", "unlock out")]
    assert len(writes) > 15
    for nth in writes:
        full_disk(nth)
        with pytest.raises(OSError, match="No space left"):
            honeloom.select(rows, output_dir=out, seed=1, mode="overwrite")
        atomic.observers.clear()
        assert os.listdir(out.parent) == ["out"], seen[nth]
        assert snapshot(out) == old


def test_a_full_disk_in_a_recipe_keeps_the_finished_stage_only(tmp_path, rows):
    scene = Scene(tmp_path, two_selections(rows, 2))
    wanted, labels = scene.straight()
    scene.reset()
    full_disk(labels.index("rename 1-pick") + 3)
    with pytest.raises(OSError, match="No space left"):
        scene.run()
    atomic.observers.clear()
    (partial,) = os.listdir(scene.place)
    assert os.listdir(scene.place / partial / "stages") == ["1-pick"]
    scene.run()
    assert snapshot(scene.out) == wanted


def test_a_bad_last_stage_does_not_cost_the_finished_ones(tmp_path, rows):
    recipe = two_selections(rows, 2).replace("method: stratified", "limit: 3, split: [0.0, 1.0e-9]")
    scene = Scene(tmp_path, recipe)
    scene.reset()
    with pytest.raises(HoneloomError, match="none of the 3 rows lies in it"):
        scene.run()
    (partial,) = os.listdir(scene.place)
    assert is_complete(scene.place / partial / "stages" / "1-pick")


@pytest.mark.slow
def test_kill_9_of_the_real_command_at_random_moments(tmp_path, with_models):
    scene = Scene(tmp_path, with_models)
    wanted, _ = scene.straight()
    command = [sys.executable, "-m", "honeloom", "run", str(scene.recipe), "--output-dir", str(scene.out)]
    scene.reset()
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    moments = random.Random(0)
    for _ in range(5):
        scene.reset()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * moments.uniform(0.4, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        scene.finish()
        found = snapshot(scene.out)
        pages = {n for n in found if n.endswith("report.html")}
        assert {n: d for n, d in found.items() if n not in pages} == wanted
        assert os.listdir(scene.place) == ["out"]
