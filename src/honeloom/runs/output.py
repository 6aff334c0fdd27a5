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

from honeloom import system
from honeloom.errors import ConfigError, InputError, OutOfSpaceError, OutputExistsError
from honeloom.runs.atomic import commit_point, fsync_dir, remove_temporaries, rename
from honeloom.runs.lock import writer_lock
from honeloom.runs.manifest import Problem, find_damage, load_manifest, write_manifest

__all__ = ["Mode", "Output", "is_complete", "locate", "open_output", "published_name", "work_folder"]

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
    kept : tuple of Path
        Interrupted attempts with other keys; they stay until a result is published here.
    damage : Problem or None
        What is wrong with the result with this key that `final` holds; it is made again.
    """

    final: Path
    work: Path
    key: str
    verb: str
    reused: bool = False
    resumed: bool = False
    complete: bool = False
    valuable: bool = False
    kept: tuple[Path, ...] = ()
    damage: Problem | None = None

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
        Stage key. The same key and undamaged gives `reused`; the same key interrupted gives
        `resumed`; what happens with another key depends on `mode`. An interrupted run is
        taken over whatever its key was: each of its stages has a key of its own.
    verb : str
        For the manifest; "run" for a folder of stages.
    mode : {"new", "resume", "overwrite"}
        new: `out` must be absent or empty. resume: a honeloom result may be replaced.
        overwrite: anything may be replaced, and interrupted attempts with other keys are
        removed at once. The old result stays until the new is complete.
    reuse : bool
        Whether a complete result with the same key is taken as it is.
    inputs : sequence of Path
        What the work reads; a folder that holds any of it is never replaced.

    Raises
    ------
    OutputExistsError
        `out` holds something that `mode` does not allow to replace, be it a damaged result.
    ConfigError
        `out` can be no folder of its own.
    LockedError
        Another process writes `out`.
    """
    out = locate(out)
    _make_parent(out)
    with writer_lock(out):
        _recover(out)
        manifest = load_manifest(out) if reuse else None
        found = manifest is not None and manifest["key"] == key
        damage = find_damage(out) if found else None
        if found and damage is None:
            yield Output(out, out, key, verb, reused=True)
            return
        if damage is not None and mode == "new":
            raise OutputExistsError(
                f"{out} holds this result, but {damage.file} is damaged ({damage.problem}); "
                "pass --resume or --overwrite to make it again"
            )
        _require_replaceable(out, mode, inputs)
        output = _prepare(out, key, verb, mode)
        output.damage = damage
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
        A control character in the name, the root of the file system, or on Windows a name that it
        does not allow.
    """
    if any(ord(c) < 32 or ord(c) == 127 for c in str(out)):
        raise ConfigError(f"output folder {str(out)!r}: control characters are not allowed in its name")
    for part in out.parts if system.WINDOWS else ():
        if part not in (out.anchor, ".", "..") and (reason := system.unportable(part)):
            raise ConfigError(f"output folder {out}: {part!r}: {reason}; choose another --output-dir")
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
    except PermissionError as error:
        raise ConfigError(
            f"{out}: {error.filename} cannot be made ({error.strerror}); choose another --output-dir"
        ) from None


def work_folder(out: Path, key: str) -> Path:
    """Where the work named by `key` is done before it stands at `out`."""
    return out.with_name(f".{out.name}.partial-{key}")


def published_name(work: Path) -> str:
    """Name that a work folder will have once it is published."""
    return work.name.removeprefix(".").partition(".partial-")[0]


def _prepare(out: Path, key: str, verb: str, mode: Mode) -> Output:
    work = work_folder(out, key)
    others = _other_attempts(out, work)
    if verb == "run" and not work.is_dir():
        runs = [p for p in others if (p / "stages").is_dir()]
        if runs:
            _take_over(max(runs, key=lambda p: (len(os.listdir(p / "stages")), p.stat().st_mtime)), work)
    others = [p for p in others if p.is_dir()]
    if mode == "overwrite":
        for stale in others:
            shutil.rmtree(stale)
        others = []
    resumed = work.is_dir()
    work.mkdir(exist_ok=True)
    remove_temporaries(work)
    return Output(out, work, key, verb, resumed=resumed, complete=is_complete(work, key), kept=tuple(others))


def _other_attempts(out: Path, work: Path) -> list[Path]:
    return sorted(p for p in out.parent.glob(f".{glob.escape(out.name)}.partial-*") if p != work)


def _take_over(stale: Path, work: Path) -> None:
    """Make an interrupted run with another key the new work folder; only its stages are of use."""
    for path in stale.iterdir():
        if path.is_file():
            path.unlink()
    rename(stale, work)


def _publish(output: Output) -> None:
    out = output.final
    for stale in _other_attempts(out, output.work):
        commit_point(f"remove {stale.name}")
        shutil.rmtree(stale)
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
            what = f"{out} holds {kept}" if kept != out else f"{out} is a folder"
            raise OutputExistsError(
                f"{what}, which this command reads or stands in, so it is never replaced; choose another --output-dir"
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
