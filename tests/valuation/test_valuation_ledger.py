"""The ledger and the executors: nothing paid twice, the same bits from everyone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from honeloom.errors import ConfigError, HoneloomError
from honeloom.runs import atomic
from honeloom.testing import games
from honeloom.valuation import Ledger, ProcessPool, TopStability, estimate
from honeloom.valuation.executors import Inline, Outcome, Task
from honeloom.valuation.ledger import evaluation_key

N, BUDGET = 12, 90
METHODS = ["regression", "permutation", "banzhaf", "truncated"]


class Written:
    """A noisy game that fails on some coalitions and writes down every call."""

    def __init__(self, path: Path, pause: float = 0.0) -> None:
        self.path, self.pause = path, pause
        self.game = games.Noisy(games.benchmark_game("pairwise", N, 1), 0.01, 3)

    def __call__(self, coalition: frozenset[int]) -> float:
        return self.evaluate(coalition, 0)

    def evaluate(self, coalition: frozenset[int], repeat: int) -> float:
        with open(self.path, "a") as file:
            file.write(json.dumps([sorted(coalition), repeat]) + "\n")
        time.sleep(self.pause)
        if 0 < sum(coalition) % 31 == 7 and len(coalition) == 5:
            raise RuntimeError("fails for ever")
        return self.game.evaluate(coalition, repeat)

    def calls(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


def run(folder: Path, method: str = "regression", **options):
    with Ledger(folder / "evaluations.jsonl", "game 1") as ledger:
        return estimate(Written(folder / "calls"), N, method=method, budget=BUDGET, seed=2, ledger=ledger, **options)


pytestmark = pytest.mark.filterwarnings("ignore:.*evaluations failed")


@pytest.fixture(autouse=True)
def _unobserved():
    yield
    atomic.observers.clear()


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_pays_nothing_and_gives_the_same_bits(tmp_path, method):
    first = run(tmp_path, method)
    paid = Written(tmp_path / "calls").calls()
    assert len(paid) == len(set(paid)) <= BUDGET
    assert run(tmp_path, method) == first
    assert Written(tmp_path / "calls").calls() == paid
    utility = Written(tmp_path / "free")
    assert estimate(utility, N, method=method, budget=BUDGET, seed=2) == first  # a ledger changes nothing


def test_what_one_method_paid_serves_another(tmp_path):
    run(tmp_path, "banzhaf")
    before = len(Written(tmp_path / "calls").calls())
    run(tmp_path, method={"type": "regression", "design": "bernoulli"})
    assert len(Written(tmp_path / "calls").calls()) == before


class Killed(BaseException):
    """Ends a run like a signal: no handler of Exception sees it."""


@pytest.mark.parametrize("after", [0, 1, 9, 10, 40, 89])
def test_a_run_killed_at_any_record_goes_on_where_it_was(tmp_path, after):
    whole = run(tmp_path / _folder(tmp_path, "whole"))
    folder = tmp_path / _folder(tmp_path, "killed")
    seen = []

    def kill(label):
        if len(seen) == after:
            raise Killed
        seen.append(label)

    atomic.observers.append(kill)
    with pytest.raises(Killed):
        run(folder)
    atomic.observers.clear()
    with open(folder / "evaluations.jsonl", "ab") as torn:
        torn.write(b'{"key": "half a rec')
    assert run(folder) == whole
    calls = Written(folder / "calls").calls()
    assert len(calls) == len(set(calls)) + 1  # only the evaluation under way is made again


def _folder(parent: Path, name: str) -> str:
    (parent / name).mkdir()
    return name


def test_kill_9_at_any_moment_and_resume(tmp_path):
    whole = run(tmp_path / _folder(tmp_path, "whole"))
    folder = tmp_path / _folder(tmp_path, "killed")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_valuation_ledger as t"
    script = f"{code}; t.slow_run({str(folder)!r})"
    for least in (1, 25, 60):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(Written(folder / "calls").calls()) < least and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert run(folder) == whole
    calls = Written(folder / "calls").calls()
    assert len(calls) <= len(set(calls)) + 3  # at most one under way at each kill


def slow_run(folder: str) -> None:
    with Ledger(Path(folder) / "evaluations.jsonl", "game 1") as ledger:
        utility = Written(Path(folder) / "calls", pause=0.02)
        estimate(utility, N, method="regression", budget=BUDGET, seed=2, ledger=ledger)


def test_records_are_keyed_by_coalition_repeat_and_fingerprint(tmp_path):
    task = Task((1, 5), 0)
    keys = {
        evaluation_key(task, "a"), evaluation_key(Task((1, 5), 1), "a"), evaluation_key(Task((15,), 0), "a"),
        evaluation_key(task, "b"), evaluation_key(Task((1, 5, 0), 0), "a"),
    }  # fmt: skip
    assert len(keys) == 5
    assert evaluation_key(Task((5, 1), 0), "a") == evaluation_key(task, "a")
    # SHA-256 of "a", "0" and "1,5" on lines of their own; a change would make every ledger worthless.
    assert evaluation_key(task, "a") == hashlib.sha256(b"a\n0\n1,5").hexdigest()
    path = tmp_path / "ledger"
    with Ledger(path, "a") as ledger:
        ledger.put(task, Outcome(1.5))
        ledger.put(Task((2,), 0), Outcome(None, "boom"))
    with Ledger(path, "a") as again, Ledger(path, "b") as other:
        assert again.get(task) == Outcome(1.5)
        assert again.get(Task((2,), 0)) == Outcome(None, "boom")
        assert other.get(task) is None
        assert len(again) == 2


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"event": "started"}\n')
    with pytest.raises(HoneloomError, match=r"other\.jsonl:1: not a record of an evaluation"):
        Ledger(path, "a")


@pytest.mark.slow
def test_a_pool_of_processes_gives_the_bits_of_this_one(tmp_path):
    utility, stop = Written(tmp_path / "calls"), TopStability(4, overlap=0.8)
    with ProcessPool(3) as pool:
        for method in METHODS:
            options = {"method": method, "budget": BUDGET, "seed": 2}
            assert estimate(utility, N, executor=pool, **options) == estimate(utility, N, **options)
            assert estimate(utility, N, executor=pool, stop=stop, **options) == estimate(
                utility, N, stop=stop, **options
            )
        paid = run(tmp_path, "regression", executor=pool)
    assert run(tmp_path, "regression", executor=Inline()) == paid  # and each reads the other's ledger


def die(coalition: frozenset[int]) -> float:
    os._exit(9)


def test_a_dead_worker_is_told(tmp_path):
    with ProcessPool(2) as pool, pytest.raises(HoneloomError, match="one of 2 worker processes died"):
        estimate(die, 4, budget=20, executor=pool)
    with ProcessPool(1) as pool, pytest.raises(ConfigError, match="cannot be sent to other processes"):
        estimate(lambda coalition: 0.0, 4, budget=20, executor=pool)
    with pytest.raises(ConfigError, match="workers 0: must be 1 or more"):
        ProcessPool(0)
