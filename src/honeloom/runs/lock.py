"""One writer per output folder."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from honeloom.errors import ConfigError, LockedError
from honeloom.runs.atomic import commit_point
from honeloom.system import drop_lock, try_lock

__all__ = ["is_held", "writer_lock"]


@contextmanager
def writer_lock(out: Path) -> Iterator[None]:
    """Hold the right to write `out`; the operating system frees it if the process dies.

    Raises
    ------
    LockedError
        Another process holds it; the message names its pid and host.
    ConfigError
        The folder of `out` cannot be written.
    """
    path = out.with_name(f".{out.name}.lock")
    fd = _acquire(path, out)
    try:
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
        commit_point(f"unlock {out.name}")
    finally:
        drop_lock(fd, path)


def is_held(out: Path) -> bool:
    """Whether some process has the right to write `out` now."""
    try:
        fd = os.open(out.with_name(f".{out.name}.lock"), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        try_lock(fd)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)  # and with it the lock, had it been free


def _acquire(path: Path, out: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise ConfigError(
                f"{out}: nothing can be written in {out.parent} ({error.strerror}); choose another --output-dir"
            ) from None
        try:
            try_lock(fd)
        except OSError:
            os.lseek(fd, 0, os.SEEK_SET)
            holder = os.read(fd, 4096).decode(errors="replace") or "an unnamed process"
            os.close(fd)
            raise LockedError(
                f"{out} is being written by {holder}; wait for it to end or choose another --output-dir"
            ) from None
        # The last holder may have unlinked the file between our open and our lock.
        try:
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
        except FileNotFoundError:
            pass  # unlinked just now: the loop opens a new one
        os.close(fd)
