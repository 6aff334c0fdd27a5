"""What a ROWS argument means: paths, globs, folders, hub ids and `lab:` splits, as a list of files."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from honeloom.data import optional
from honeloom.data.streams import Compression, chunks
from honeloom.errors import SourceError

__all__ = ["Format", "RowFile", "fingerprint", "resolve_sources"]

Format = Literal["jsonl", "json", "parquet", "arrow", "csv", "tsv", "text", "lab"]
LabSplit = Literal["pool", "dev", "test"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".csv": "csv", ".tsv": "tsv", ".txt": "text",
}  # fmt: skip
_ALLOWED = f"{' '.join(_FORMATS)}, all but .parquet and .arrow also with .gz or .zst"
# Descriptions that Hugging Face tools write beside the rows.
_NOT_ROWS = frozenset({"dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
_SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test)(?=[/_.-]|$)")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RowFile:
    """One file of rows.

    Attributes
    ----------
    label : str
        The file as the user named it (folders and hub ids are followed by the file's name).
    path : Path
        Where it lies on this machine; for `lab:` splits the label, which is no file.
    format : Format
        How records are laid out. A `.json` file with one object per line is `jsonl`.
    compression : {"", "gz", "zst"}
        What the bytes are packed with.
    from_hub : bool
        Whether the file was fetched from a hub.
    without : tuple of str
        Ids of rows that are withdrawn: readers pass over them as if they were not there.
    """

    label: str
    path: Path
    format: Format
    compression: Compression = ""
    from_hub: bool = False
    without: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The name without folder and endings, used as the source of rows that name none."""
        if self.format == "lab":
            return self.label.replace(":", "-")
        name = self.path.name
        for ending in (f".{self.compression}", *_FORMATS):
            name = name.removesuffix(ending) if len(ending) > 1 else name
        return name

    @property
    def split(self) -> str:
        """The lab split of a `lab:` file."""
        return self.label.removeprefix("lab:")


def resolve_sources(args: Sequence[str], *, fetch_hub: Callable[[str], Path] | None = None) -> tuple[RowFile, ...]:
    """Find the files that ROWS arguments name, in the order given.

    Parameters
    ----------
    args : sequence of str
        Each a file, a glob (sorted), a folder (one of our outputs, a saved `datasets` folder or
        row files), a hub id `org/name[@rev]`, or `lab:pool`, `lab:dev`, `lab:test`.
    fetch_hub : callable, optional
        Downloads a hub id and returns a local folder; without it hub ids are an error.

    Raises
    ------
    SourceError
        If an argument names nothing that can be read.
    """
    if not args:
        raise SourceError(f"no rows given: name at least one file, folder, hub id or lab split ({_ALLOWED})")
    return tuple(file for arg in args for file in _resolve(str(arg), fetch_hub))


def fingerprint(files: Iterable[RowFile]) -> str:
    """Return the SHA-256 (64 hex digits) of the files' contents in order, whatever their names.

    A lab split counts by the canonical JSON of its rows.
    """
    total = hashlib.sha256()
    for file in files:
        total.update(_file_digest(file))
    return total.hexdigest()


def _file_digest(file: RowFile) -> bytes:
    if file.format == "lab":
        digest = hashlib.sha256()
        for row in optional.lab_rows(file.split):
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return digest.digest()
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise SourceError(f"cannot read {file.label}: {error.strerror}") from error


def _resolve(arg: str, fetch_hub: Callable[[str], Path] | None) -> list[RowFile]:
    _check_name(arg)
    if arg.startswith("lab:"):
        return [_lab(arg)]
    path = Path(os.path.expanduser(arg))  # unlike Path's, it leaves an unknown ~user as it is
    try:
        if path.is_dir():
            return _folder(path, arg.rstrip("/") or "/")
        if path.exists():
            return [_file(path, arg)]
    except OSError as error:
        raise SourceError(f"cannot read {arg[:200]}: {error.strerror}") from error
    if glob.has_magic(arg):
        return _glob(arg, path)
    if _HUB_ID.fullmatch(arg) and _format_of(arg.partition("@")[0]) is None:
        return _hub(arg, fetch_hub)
    raise _missing(arg, path)


def _check_name(name: str) -> None:
    if not name:
        raise SourceError("an empty name was given for rows; name a file, folder, hub id or lab split")
    if bad := _UNPRINTABLE.search(name):
        code = ord(bad[0])
        raise SourceError(f"the name {name!r} holds the character U+{code:04X}; rename the file")


def _lab(arg: str) -> RowFile:
    split = arg.removeprefix("lab:")
    if split not in get_args(LabSplit):
        raise SourceError(f"unknown lab split {arg!r}; there are lab:pool, lab:dev and lab:test")
    return RowFile(arg, Path(arg), "lab")


def _format_of(name: str) -> tuple[Format, Compression] | None:
    lower, compression = name.lower(), ""
    for ending in ("gz", "zst"):
        if lower.endswith(f".{ending}"):
            lower, compression = lower.removesuffix(f".{ending}"), ending
    found = _FORMATS.get(Path(lower).suffix)
    if found is None or (compression and found in ("parquet", "arrow")):
        return None
    return found, cast(Compression, compression)


def _file(path: Path, label: str, *, from_hub: bool = False) -> RowFile:
    _check_name(label)
    known = _format_of(path.name)
    if known is None:
        raise SourceError(f"{label} has no ending that tells its format; allowed: {_ALLOWED}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise SourceError(f"{label} is not a regular file; rows are read more than once: save them first")
    form, compression = known
    if form == "json" and _first_byte(path, compression, label) != b"[":
        form = "jsonl"
    return RowFile(label, path, form, compression, from_hub)


def _first_byte(path: Path, compression: Compression, label: str) -> bytes:
    for piece in chunks(path, compression, label):
        if text := piece.lstrip():
            return text[:1]
    return b""


def _glob(arg: str, path: Path) -> list[RowFile]:
    found = sorted(glob.glob(str(path), recursive=True))
    files = [Path(name) for name in found if Path(name).is_file() and _is_rows(Path(name))]
    if not files:
        what = f"only {', '.join(found[:5])}, which hold no rows" if found else "nothing"
        raise SourceError(f"the pattern {arg!r} matches {what}; allowed endings: {_ALLOWED}")
    return [_file(file, str(file)) for file in files]


def _is_rows(path: Path) -> bool:
    return _format_of(path.name) is not None and path.name not in _NOT_ROWS


def _folder(folder: Path, label: str, *, from_hub: bool = False) -> list[RowFile]:
    """Read the folder's own description first: our manifest, then that of a saved data set."""
    if (folder / "manifest.json").is_file():
        return [_selected(folder, label)]
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder, label)
    if (folder / "state.json").is_file():
        return _saved_dataset(folder, label)
    pattern = "**/*" if from_hub else "*"
    files = sorted(p for p in folder.glob(pattern) if p.is_file() and _is_rows(p) and p.name[0] != ".")
    if not files:
        names = _some(p.name for p in folder.iterdir())
        raise SourceError(f"the folder {label} holds no row files (it holds: {names}); allowed: {_ALLOWED}")
    if from_hub:
        files = _training_split(folder, files)
    return [_file(p, f"{label}/{p.relative_to(folder).as_posix()}", from_hub=from_hub) for p in files]


def _selected(folder: Path, label: str) -> RowFile:
    found = sorted(p for p in folder.glob("selected.*") if _is_rows(p))
    if len(found) != 1:
        names = _some(p.name for p in folder.iterdir())
        raise SourceError(
            f"{label} is an output folder with {len(found)} files named selected.*, expected one "
            f"(it holds: {names}); name the folder of a select stage, or one file"
        )
    return _file(found[0], f"{label}/{found[0].name}")


def _saved_splits(folder: Path, label: str) -> list[RowFile]:
    splits = _read_json(folder / "dataset_dict.json", label).get("splits")
    if not isinstance(splits, list) or not splits:
        raise SourceError(f"{label}/dataset_dict.json lists no splits; save the data set again")
    if len(splits) > 1:
        names = ", ".join(map(str, splits))
        raise SourceError(f"{label} holds the splits {names}: name one, as in {label}/{splits[0]}")
    return _saved_dataset(folder / str(splits[0]), f"{label}/{splits[0]}")


def _saved_dataset(folder: Path, label: str) -> list[RowFile]:
    """List the Arrow files of a saved data set in the order its state names them."""
    state = _read_json(folder / "state.json", label)
    try:
        names = [Path(str(part["filename"])).name for part in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{label}/state.json names no data files; save the data set again") from error
    if state.get("_indices_files"):
        raise SourceError(f"{label} keeps its rows behind an index; flatten_indices() and save it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SourceError(f"{label} lacks {', '.join(missing[:3])}, which its state.json names")
    return [_file(folder / name, f"{label}/{name}") for name in names]


def _read_json(path: Path, label: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {label}/{path.name}: {error}") from error
    return value if isinstance(value, dict) else {}


def _hub(arg: str, fetch_hub: Callable[[str], Path] | None) -> list[RowFile]:
    if fetch_hub is None:
        near = _nearby(Path(arg))
        raise SourceError(
            f"{arg!r} is no file or folder here, and hub data sets cannot be fetched in this call; "
            f"download it and give its folder{near}"
        )
    return _folder(fetch_hub(arg), arg, from_hub=True)


def _training_split(folder: Path, files: list[Path]) -> list[Path]:
    """Keep a hub data set's `train` files, where its file names tell the splits apart."""
    splits = {p: _SPLIT.findall(p.relative_to(folder).as_posix().lower()) for p in files}
    return [p for p in files if "train" in splits[p]] or files


def _missing(arg: str, path: Path) -> SourceError:
    return SourceError(f"no such file or folder: {arg}{_nearby(path)}")


def _nearby(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (the folder {parent} does not exist either)"
    names = [p.name for p in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return (", ".join(ordered[:8]) or "nothing") + more
