"""The evaluations that were paid for, on disk: none is paid twice, whatever stops the run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

from honeloom.errors import HoneloomError
from honeloom.runs.journal import Journal, read_journal
from honeloom.valuation.executors import Outcome, Task

__all__ = ["Ledger", "evaluation_key"]


def evaluation_key(task: Task, fingerprint: str) -> str:
    """SHA-256 over the utility's fingerprint, the repeat number and the members in ascending order."""
    text = "\n".join((fingerprint, str(task.repeat), ",".join(map(str, sorted(task.members)))))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Ledger:
    """Outcomes by content, in an append-only journal; use it as a context.

    Failures are recorded like values: a resumed run must see what the first one saw.

    Parameters
    ----------
    path : Path
        The journal; created if absent, continued if not.
    fingerprint : str
        Stands for everything the utility's numbers depend on (model, rows, settings, code).
        Records of another fingerprint are left alone.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._known: dict[str, Outcome] = {}
        for number, record in enumerate(read_journal(path), 1):
            try:
                self._known[record["key"]] = Outcome(record["value"], record["error"])
            except (KeyError, TypeError):
                raise HoneloomError(
                    f"{path}:{number}: not a record of an evaluation (needs key, value and error); name another file"
                ) from None
        self._journal = Journal(path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, task: Task) -> Outcome | None:
        """Return what was recorded of a task, or None."""
        return self._known.get(evaluation_key(task, self._fingerprint))

    def put(self, task: Task, outcome: Outcome) -> None:
        """Record an outcome; it survives a kill once this returns."""
        key = evaluation_key(task, self._fingerprint)
        self._journal.append(
            {"key": key, "size": len(task.members), "repeat": task.repeat, "value": outcome.value,
             "error": outcome.error}
        )  # fmt: skip
        self._known[key] = outcome

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
