"""The manifest: size and SHA-256 of every file of a folder, written last.

A folder without a manifest does not exist as a result. `checksum` covers the manifest's own
content, so that a flipped byte in it is found too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from honeloom.errors import SourceError
from honeloom.runs.atomic import canonical_json, commit_point, fsync_dir, fsync_file, write_bytes
from honeloom.system import available_memory, cores, forget_pages

__all__ = [
    "MANIFEST", "Problem", "find_damage", "load_manifest", "refresh_manifest", "render_manifest", "sha256_file",
    "sha256_files", "verify_folder", "write_manifest",
]  # fmt: skip

MANIFEST = "manifest.json"
SCHEMA = "honeloom.manifest/1"
_UNLISTED = "not in the manifest"
_LARGE, _PIECE = 1 << 30, 1 << 24
_WORTH_KEEPING, _SETTLED = 1 << 20, 2.0
_hashed: dict[tuple[int, ...], str] = {}
"""Digests of large files that this process has read: their place on the disk, size and times of change -> digest."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One way in which a folder is not what its manifest says."""

    file: str
    problem: str
    expected: str | int | None = None
    found: str | int | None = None


def sha256_file(path: Path, *, anew: bool = False) -> str:
    """Hex SHA-256 of a file's content.

    A file that would push everything else out of the page cache leaves it again while it is read;
    a smaller one stays there, as it is usually loaded next. With `anew` the file is read even if this process has
    hashed it before and it has not changed since.
    """
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if anew or state not in _hashed:
            digest = _sha256(file, found.st_size)
            # Times of change are coarse: what has just been written may change without a trace.
            if found.st_size >= _WORTH_KEEPING and time.time() - found.st_mtime > _SETTLED:
                _hashed[state] = digest
            return digest
        return _hashed[state]


def sha256_files(paths: Sequence[Path]) -> dict[Path, str]:
    """Hex SHA-256 of several files, as many at a time as there are processors."""
    with ThreadPoolExecutor(cores()) as crew:
        return dict(zip(paths, crew.map(sha256_file, paths), strict=True))


def _sha256(file: BufferedReader, size: int) -> str:
    if size < _LARGE or size < available_memory() // 2:
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest, done = hashlib.sha256(), 0
    while piece := file.read(_PIECE):
        digest.update(piece)
        forget_pages(file.fileno(), done, len(piece))
        done += len(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, key: str, verb: str) -> None:
    """Flush every file of `folder`, then write its manifest atomically.

    Parameters
    ----------
    folder : Path
        A finished folder that no one else writes.
    key : str
        The stage key, so that the same work is found again.
    verb : str
        The command that made it.
    """
    files: dict[str, dict[str, str | int]] = {}
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # some libraries write files that only their owner may read
    for name in _files(folder):
        path = folder / name
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
        commit_point(f"fsync {name}")
        fsync_file(path)
        files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    for parent, _, _ in os.walk(folder):
        fsync_dir(Path(parent))
    write_bytes(folder / MANIFEST, render_manifest({"schema": SCHEMA, "verb": verb, "key": key, "files": files}))


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, or None where there is none or it is damaged, be it in one byte of its spacing."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        document = json.loads(raw)
        sound = document["schema"] == SCHEMA and raw == render_manifest(document)
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return dict(document) if sound else None


def verify_folder(folder: Path, *, inspect: Callable[[Path], str | None] | None = None) -> tuple[int, list[Problem]]:
    """Compare a folder with its manifest.

    Parameters
    ----------
    folder : Path
        A result folder.
    inspect : callable, optional
        Looks inside a file whose hash is right and returns what is wrong with it, or None.

    Returns
    -------
    (int, list of Problem)
        Number of files checked, and every problem found.

    Raises
    ------
    SourceError
        `folder` is not a folder.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder; pass the output folder of a honeloom command")
    if not (folder / MANIFEST).exists():
        return 0, [Problem(MANIFEST, "missing: not a finished honeloom result", MANIFEST, None)]
    manifest = load_manifest(folder)
    if manifest is None:
        return 0, [Problem(MANIFEST, "damaged: its content does not match its own checksum")]
    listed: dict[str, dict[str, Any]] = manifest["files"]
    problems = [p for name, entry in listed.items() if (p := _check(folder, name, entry, inspect))]
    present = set(_files(folder))
    problems += [Problem(name, _UNLISTED, None, name) for name in sorted(present - set(listed))]
    return len(listed), problems


def find_damage(folder: Path) -> Problem | None:
    """The first file that is not as the folder's manifest says; files that were added do no harm."""
    return next((p for p in verify_folder(folder)[1] if p.problem != _UNLISTED), None)


def _check(
    folder: Path, name: str, entry: dict[str, Any], inspect: Callable[[Path], str | None] | None
) -> Problem | None:
    path = folder / name
    if not path.is_file():
        return Problem(name, "missing", entry["size"], None)
    size = path.stat().st_size
    if size != entry["size"]:
        return Problem(name, "wrong size", entry["size"], size)
    digest = sha256_file(path, anew=True)
    if digest != entry["sha256"]:
        return Problem(name, "wrong content", entry["sha256"], digest)
    fault = inspect(path) if inspect else None
    return Problem(name, fault) if fault else None


def render_manifest(document: dict[str, Any]) -> bytes:
    """The manifest's bytes: its content, then the checksum over it."""
    content = {key: document[key] for key in ("schema", "verb", "key", "files")}
    checksum = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    text = json.dumps({**content, "checksum": checksum}, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _files(folder: Path) -> Iterator[str]:
    """Relative POSIX names of all files but the top manifest, sorted."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink()]
    return iter(sorted(n for n in names if n != MANIFEST))


def refresh_manifest(folder: Path, names: list[str]) -> None:
    """Take newly written files into an existing sound manifest."""
    manifest = load_manifest(folder)
    if manifest is None:
        raise SourceError(f"{folder} has no sound {MANIFEST}; run `honeloom verify {folder}`")
    for name in names:
        path = folder / name
        fsync_file(path)
        manifest["files"][name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    manifest["files"] = dict(sorted(manifest["files"].items()))
    write_bytes(folder / MANIFEST, render_manifest(manifest))
