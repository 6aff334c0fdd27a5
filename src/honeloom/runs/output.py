"""The life of an output folder: lock, build beside it, write the manifest last, rename once."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from honeloom.errors import ConfigError, InputError, OutOfSpaceError, OutputExistsError
from honeloom.runs.atomic import commit_point, fsync_dir, remove_temporaries, rename
from honeloom.runs.lock import writer_lock
from honeloom.runs.manifest import load_manifest, write_manifest

__all__ = ["Mode", "Output", "is_complete", "locate", "open_output"]

Mode = Literal["new", "resume", "overwrite"]


@dataclass(slots=True)
class Output:
    """An output folder under construction.

    Attributes
    ----------
    final : Path
        Where the result will stand.
    work : Path
        Where files are written now; a hidden sibling of `final`.
    reused : bool
        `final` already holds the complete result with this key; `work` is `final`.
    resumed : bool
        `work` holds files of an interrupted attempt with the same key.
    valuable : bool
        `work` holds something finished, so that a failure leaves it for the next attempt.
    """

    final: Path
    work: Path
    key: str
    verb: str
    reused: bool = False
    resumed: bool = False
    complete: bool = False
    valuable: bool = False

    def finish(self) -> None:
        """Write the manifest; the folder is renamed into place when the context ends."""
        write_manifest(self.work, self.key, self.verb)
        self.complete = True


def is_complete(folder: Path, key: str | None = None) -> bool:
    """Whether `folder` has a sound manifest (with this key) and every file has the right size."""
    manifest = load_manifest(folder)
    if manifest is None or (key is not None and manifest["key"] != key):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["size"]
        for name, entry in manifest["files"].items()
    )


@contextmanager
def open_output(
    out: Path, key: str, verb: str, *, mode: Mode = "new", reuse: bool = True, inputs: Sequence[Path] = ()
) -> Iterator[Output]:
    """Open `out` for the work named by `key`.

    Parameters
    ----------
    out : Path
        The folder the user named; a symbolic link is followed.
    key : str
        Stage key. The same key and complete gives `reused`; the same key interrupted gives
        `resumed`; what happens with another key depends on `mode`.
    verb : str
        For the manifest.
    mode : {"new", "resume", "overwrite"}
        new: `out` must be absent or empty. resume: a honeloom result may be replaced.
        overwrite: anything may be replaced. The old stays until the new is complete.
    reuse : bool
        Whether a complete result with the same key is taken as it is.
    inputs : sequence of Path
        What the work reads; a folder that holds any of it is never replaced.

    Raises
    ------
    OutputExistsError
        `out` holds something that `mode` does not allow to replace.
    ConfigError
        `out` can be no folder of its own.
    LockedError
        Another process writes `out`.
    """
    out = locate(out)
    _make_parent(out)
    with writer_lock(out):
        _recover(out)
        if reuse and is_complete(out, key):
            yield Output(out, out, key, verb, reused=True)
            return
        _require_replaceable(out, mode, inputs)
        output = _prepare(out, key, verb)
        try:
            yield output
        except (InputError, OutOfSpaceError, OSError):
            if not (output.resumed or output.valuable):
                shutil.rmtree(output.work, ignore_errors=True)  # nothing in it is worth resuming
            raise
        if output.complete:
            _publish(output)


def locate(out: Path) -> Path:
    """Return the absolute path of an output folder, symbolic links followed.

    Raises
    ------
    ConfigError
        A control character in the name, or the root of the file system.
    """
    if any(ord(c) < 32 or ord(c) == 127 for c in str(out)):
        raise ConfigError(f"output folder {str(out)!r}: control characters are not allowed in its name")
    found = Path(os.path.realpath(out))
    if not found.name:
        raise ConfigError(f"output folder {found}: the root of the file system cannot hold a result; name a folder")
    return found


def _make_parent(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file; --output-dir must name a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        held = next(p for p in out.parents if p.exists())
        raise OutputExistsError(f"{out}: {held} is a file, so no folder can lie in it") from None


def _prepare(out: Path, key: str, verb: str) -> Output:
    work = out.with_name(f".{out.name}.partial-{key}")
    for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        if stale != work:
            shutil.rmtree(stale)
    resumed = work.is_dir()
    work.mkdir(exist_ok=True)
    remove_temporaries(work)
    return Output(out, work, key, verb, resumed=resumed, complete=is_complete(work, key))


def _publish(output: Output) -> None:
    out = output.final
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        rename(out, old)
    rename(output.work, out)
    if old.exists():
        commit_point(f"remove {old.name}")
        shutil.rmtree(old)
        fsync_dir(out.parent)


def _recover(out: Path) -> None:
    """Undo a swap that was interrupted between its two renames."""
    old = out.with_name(f".{out.name}.old")
    if not old.exists():
        return
    if out.exists():
        shutil.rmtree(old)
    else:
        rename(old, out)


def _require_replaceable(out: Path, mode: Mode, inputs: Sequence[Path]) -> None:
    if not out.exists():
        return
    for kept in (Path.cwd(), Path.home(), *(Path(os.path.realpath(i)) for i in inputs)):
        if kept == out or out in kept.parents:
            raise OutputExistsError(
                f"{out} {'is' if kept == out else 'holds'} {kept}, which this command reads or stands in; "
                "choose another --output-dir"
            )
    if not any(out.iterdir()):
        return
    manifest = load_manifest(out)
    if mode == "overwrite" or (mode == "resume" and manifest is not None):
        return
    holds = f"a result of `honeloom {manifest['verb']}` with other settings or inputs" if manifest else "other files"
    raise OutputExistsError(
        f"{out} is not empty: it holds {holds}; choose another --output-dir, or pass --overwrite to replace it "
        "once the new result is complete"
    )
