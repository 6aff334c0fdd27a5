"""An append-only journal: one JSON object per line, durable once `append` returns.

Whoever must survive a kill (resumable stages, evaluation ledgers, federated rounds) records
finished work here. A line torn by a crash is dropped when the journal is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from honeloom.errors import HoneloomError
from honeloom.runs.atomic import canonical_json, commit_point

__all__ = ["Journal", "read_journal"]


class Journal:
    """Append-only JSON lines.

    Parameters
    ----------
    path : Path
        File to append to; created if absent. A torn last line is cut off.
    durable : bool, default True
        Whether `append` waits for the disk. Event logs pass False.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        keep = _complete_length(path)
        self._file = open(path, "ab")  # noqa: SIM115 - held open for the journal's life
        if self._file.tell() > keep:
            self._file.truncate(keep)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it survives a kill once this returns (if durable)."""
        line = canonical_json(record).encode() + b"\n"
        commit_point(f"append {self.path.name}")
        self._file.write(line)
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete records of a journal; none if it does not exist.

    Raises
    ------
    HoneloomError
        A line before the last is not JSON: the file was damaged, not torn.
    """
    if not path.exists():
        return
    left = _complete_length(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            left -= len(line)
            if left < 0:
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise HoneloomError(
                    f"{path}:{number}: damaged journal line ({error}); restore the file or start over with --overwrite"
                ) from None


def _complete_length(path: Path) -> int:
    """Bytes up to and including the last newline; what follows it was torn by a crash."""
    if not path.exists():
        return 0
    end = path.stat().st_size
    with open(path, "rb") as file:
        while end:
            start = max(0, end - (1 << 20))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
