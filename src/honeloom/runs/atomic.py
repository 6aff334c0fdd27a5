"""Durable writes: a file or folder is either complete or not there.

Every durable change passes through `commit_point`, so that tests can stop the process at
each of them and require that a second run repairs everything.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from honeloom import system
from honeloom.errors import OutOfSpaceError

__all__ = [
    "canonical_json",
    "commit_point",
    "fsync_dir",
    "fsync_file",
    "observers",
    "open_atomic",
    "remove_temporaries",
    "rename",
    "require_space",
    "write_bytes",
    "write_json",
]


observers: list[Callable[[str], None]] = []
"""Called with the label of every commit point; tests add one that kills the process or fails there."""

_TEMPORARY = re.compile(r"^\..+\.tmp-\d+-[0-9a-f]{8}$")


def commit_point(label: str) -> None:
    """Tell the observers that a durable change follows."""
    for observe in observers:
        observe(label)


def fsync_file(path: Path) -> None:
    """Flush one file's content to the disk."""
    fd = os.open(path, os.O_RDWR if system.WINDOWS else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_dir(path: Path) -> None:
    """Flush a folder's entries to the disk, where the platform can."""
    system.sync_folder(path)


def rename(source: Path, target: Path) -> None:
    """Rename within one folder and flush that folder."""
    commit_point(f"rename {target.name}")
    system.replace(source, target)
    fsync_dir(target.parent)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears whole, or not at all: temporary sibling, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            commit_point(f"fsync {path.name}")
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with open_atomic(path) as file:
        file.write(data)


def remove_temporaries(folder: Path) -> None:
    """Remove what `open_atomic` left below a folder when its process was killed; only for its one writer."""
    for path in folder.rglob(".*.tmp-*"):
        if _TEMPORARY.match(path.name):
            path.unlink(missing_ok=True)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, keys in the given order."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def require_space(folder: Path, needed: int) -> None:
    """Raise OutOfSpaceError unless the disk under `folder` has 1.1 times `needed` bytes free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * 1.1:
        raise OutOfSpaceError(
            f"{folder}: {needed:,} bytes are needed (times 1.1 for safety) and {free:,} are free; "
            "free some room or choose another --output-dir"
        )
