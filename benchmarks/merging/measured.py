"""One command in a process of its own: time, memory and bytes of it and of every process it starts.

Linux only: /proc is read every 50 ms. Resident memory is summed over the processes, so pages that two of them share
count twice; files that are mapped count while they are resident. This module imports nothing heavy, so that the
measuring process stays small.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 0.05
GIB = 2**30


@dataclass(slots=True)
class Usage:
    """What a command took.

    Attributes
    ----------
    wall, user, system : float
        Seconds; user and system of the whole tree.
    rss, anonymous : int
        Peak bytes of resident memory, and of its part that no file backs.
    asked, read, written : int
        Bytes asked for in read calls (a mapped file is not), read from the disk, and handed to the file system.
    seconds : list
        Second by second [peak of rss, peak of anonymous].
    """

    status: int = 0
    wall: float = 0.0
    user: float = 0.0
    system: float = 0.0
    rss: int = 0
    anonymous: int = 0
    asked: int = 0
    read: int = 0
    written: int = 0
    seconds: list[list[int]] = field(default_factory=list)

    @property
    def cpu(self) -> float:
        """User and system time in seconds."""
        return self.user + self.system

    def note(self, elapsed: float, rss: int, anonymous: int) -> None:
        """Keep one look at the memory."""
        while len(self.seconds) <= int(elapsed):
            self.seconds.append([0, 0])
        last = self.seconds[int(elapsed)]
        last[0], last[1] = max(last[0], rss), max(last[1], anonymous)
        self.rss, self.anonymous = max(self.rss, rss), max(self.anonymous, anonymous)


def measured(command: Sequence[str], log: Path, variables: Mapping[str, str | None] | None = None) -> Usage:
    """Run a command to its end.

    Parameters
    ----------
    command : sequence of str
        Program and arguments.
    log : Path
        Where its output goes.
    variables : mapping, optional
        Environment variables to set, or with None to unset.
    """
    changed = {**os.environ, **(variables or {})}
    env = {name: value for name, value in changed.items() if value is not None}
    usage, begun = Usage(), time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            usage.note(time.monotonic() - begun, *_memory(process.pid))
            time.sleep(INTERVAL)
    except BaseException:
        process.kill()
        process.wait()
        raise
    usage.wall = time.monotonic() - begun
    io = _fields(
        f"/proc/{process.pid}/io"
    )  # of the whole tree: processes that were waited for are added to their parent
    usage.asked, usage.read, usage.written = io.get("rchar", 0), io.get("read_bytes", 0), io.get("wchar", 0)
    _, status, spent = os.wait4(process.pid, 0)
    usage.status = process.returncode = os.waitstatus_to_exitcode(status)
    usage.user, usage.system = spent.ru_utime, spent.ru_stime
    return usage


def _memory(root: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and all below it."""
    found = [_fields(f"/proc/{pid}/status") for pid in _tree(root)]
    return tuple(1024 * sum(f.get(name, 0) for f in found) for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def _tree(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            waiting += map(int, _text(path).split())
    return found


def _fields(path: str) -> dict[str, int]:
    """Whole numbers of a file of "name: number" lines."""
    parts = (line.split() for line in _text(Path(path)).splitlines())
    return {p[0].rstrip(":"): int(p[1]) for p in parts if len(p) > 1 and p[1].isdigit()}


def _text(path: Path) -> str:
    """Content, or nothing once the process is gone."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
