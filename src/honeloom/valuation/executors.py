"""Who calls the utility: this process, or a pool of processes; the results are the same.

An executor has one narrow method, `map_utilities`: it yields (index, outcome) in whatever
order evaluations end. The caller puts them in their planned places, so neither the number of
workers nor their speed changes a bit. `honeloom.backends.ray` has one for a Ray cluster.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

from honeloom.errors import ConfigError, HoneloomError

__all__ = ["Executor", "Inline", "Outcome", "ProcessPool", "RepeatableUtility", "Task", "Utility", "call_utility"]

Utility = Callable[[frozenset[int]], float]


@runtime_checkable
class RepeatableUtility(Protocol):
    """A utility that draws random numbers and can draw the same ones again.

    `evaluate` is called in place of the utility itself; its result must follow from its
    arguments, so that a resumed or parallel run sees the numbers of the first one.
    """

    def evaluate(self, coalition: frozenset[int], repeat: int) -> float:
        """Value of a coalition, the `repeat`-th time (from 0)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One evaluation: the members, ascending, and how often this coalition came before."""

    members: tuple[int, ...]
    repeat: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation gave: a finite value, or why there is none."""

    value: float | None
    error: str | None = None


class Executor(Protocol):
    """Runs evaluations."""

    def map_utilities(self, utility: Utility, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        """Yield (index into tasks, outcome) once for every task, in any order."""


def call_utility(utility: Utility, task: Task) -> Outcome:
    """Evaluate one task; an exception and a value that is not finite are failures, not numbers."""
    coalition = frozenset(task.members)
    try:
        if isinstance(utility, RepeatableUtility):
            value = float(utility.evaluate(coalition, task.repeat))
        else:
            value = float(utility(coalition))
    except Exception as error:  # a utility is a stranger's code
        return Outcome(None, f"{type(error).__name__}: {error}")
    return Outcome(value) if math.isfinite(value) else Outcome(None, f"the utility is {value}")


class Inline:
    """Evaluates in this process, in the planned order."""

    def map_utilities(self, utility: Utility, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        """Yield the outcomes in order."""
        for index, task in enumerate(tasks):
            yield index, call_utility(utility, task)


class ProcessPool:
    """Evaluates in processes of their own; use it as a context.

    Parameters
    ----------
    workers : int
        Number of processes. They are started afresh, so the utility must be picklable; it is
        sent to each of them once, and a script needs its `if __name__ == "__main__":`.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"workers {workers}: must be 1 or more")
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._utility: Utility | None = None

    def map_utilities(self, utility: Utility, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        """Yield the outcomes as they come.

        Raises
        ------
        ConfigError
            The utility cannot be pickled.
        HoneloomError
            A process died.
        """
        pool = self._start(utility)
        futures = {pool.submit(_evaluate, task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise HoneloomError(
                f"one of {self._workers} worker processes died while it evaluated (out of memory, or the utility "
                "cannot be imported there); try fewer workers. With a ledger, what was finished is kept"
            ) from None

    def _start(self, utility: Utility) -> ProcessPoolExecutor:
        if self._pool is None or self._utility is not utility:
            self.close()
            try:
                blob = pickle.dumps(utility)
            except Exception as error:  # __reduce__ may raise anything
                raise ConfigError(
                    f"the utility cannot be sent to other processes ({error}); define it at the top of a module and "
                    "give it picklable data, or evaluate in this process"
                ) from None
            self._pool = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), initializer=_hold, initargs=(blob,)
            )
            self._utility = utility
        return self._pool

    def close(self, *, at_once: bool = False) -> None:
        """End the processes, after the evaluations that are under way or in the midst of them."""
        if self._pool is not None:
            # Python 3.14 has terminate_workers for this.
            running = list((self._pool._processes or {}).values()) if at_once else []
            for process in running:
                process.terminate()
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._utility = None

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=error is not None)  # whoever stops a run should not wait for a tuning to end


_held: list[Utility] = []
"""The utility of a worker process; it is sent once, not with every task."""


def _hold(blob: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the leading process answers it
    _held[:] = [pickle.loads(blob)]


def _evaluate(task: Task) -> Outcome:
    return call_utility(_held[0], task)
