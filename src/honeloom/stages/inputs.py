"""Inputs: from what the user wrote to local files with a fingerprint of their content."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from honeloom import lab
from honeloom.checkpoint.folders import read_config
from honeloom.config.base import InputField, InputKind
from honeloom.data.sources import RowFile, fingerprint, resolve_sources
from honeloom.errors import CheckpointError, NotCachedError, SourceError
from honeloom.registry import load_target
from honeloom.runs.keys import combine_digests
from honeloom.runs.manifest import load_manifest, sha256_file, sha256_files

__all__ = [
    "Placed",
    "ResolvedInput",
    "Resolver",
    "adapter_base",
    "artefact_fingerprint",
    "model_files",
    "recorded_inputs",
    "resolve_adapter",
    "resolve_model",
    "resolve_rows",
]

K = TypeVar("K", bound=Hashable)
_HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]{0,95}/\w([\w.-]{0,94}\w)?(@\w[\w./-]*)?", re.ASCII)
_DESCRIBED_BY = frozenset({"config.json", "adapter_config.json", "examples.parquet"})  # the last: an evaluation
INPUTS_SCHEMA = "honeloom.inputs/1"
"""`schema` of every `inputs.json`; `stages.runner.describe_inputs` says what stands in it."""
_MODEL_FILES = re.compile(
    r"^(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json$"
    r"|\.safetensors$|\.safetensors\.index\.json$|^merges\.txt$|^vocab\.txt$|\.model$|^chat_template\.(jinja|json)$"
    r"|^examples\.parquet$"
)


@dataclass(frozen=True, slots=True)
class ResolvedInput:
    """One input as found on disk.

    Attributes
    ----------
    place : str
        Its place in the config.
    value : str
        As the user wrote it.
    paths : tuple of Path
        The model's folder, or the files of the rows.
    fingerprint : str
        SHA-256 over the content; equal content has equal fingerprints wherever it lies.
    size : int
        Bytes.
    files : tuple of RowFile
        For rows: how each file is read.
    revision : str or None
        Commit of a hub model or dataset.
    relative : str or None
        For an artefact of the same run: its folder as seen from the stage that reads it.
    missing : bool
        A hub artefact that is not in the cache yet (only in plans).
    base : Path or None
        For an adapter: the folder of its base model.
    withdrawn : tuple of str
        For rows: ids that stand in the files and are not read.
    """

    place: str
    kind: InputKind
    value: str
    paths: tuple[Path, ...]
    fingerprint: str
    size: int
    files: tuple[RowFile, ...] = ()
    revision: str | None = None
    relative: str | None = None
    missing: bool = False
    base: Path | None = None
    withdrawn: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What to call it in messages: the stage's name within a run, else as the user wrote it."""
        return Path(self.value).name.partition("-")[2] if self.relative else self.value

    @property
    def published(self) -> Path | None:
        """For an artefact of the same run: the folder it will have."""
        return Path(self.value) if self.relative else None


@dataclass(frozen=True, slots=True)
class Placed:
    """An artefact that the running recipe has just made: where it is now, and its content."""

    path: Path
    fingerprint: str
    relative: str
    file: str = "."
    shown: str = ""
    """`file` is the artefact itself below `path`, where it is one file. `shown` is the path that it will have, where
    that is not the one by which settings refer to it."""


class Resolver:
    """Finds and fingerprints inputs, each only once.

    Parameters
    ----------
    fetch : bool
        Whether a hub id may be downloaded; otherwise it comes back `missing`.
    pending : mapping, optional
        Paths that stages of the running recipe will have -> the stage's name. Until `place`
        says where such an artefact is, it resolves to a symbol without content.
    """

    def __init__(self, *, fetch: bool = True, pending: Mapping[str, str] | None = None) -> None:
        self._fetch = fetch
        self._pending = dict(pending or {})
        self._placed: dict[str, Placed] = {}
        self._found: dict[tuple[str, str], ResolvedInput] = {}
        self._changed: dict[tuple[ResolvedInput, Hashable], ResolvedInput] = {}

    def place(self, value: str, placed: Placed) -> None:
        """Say where an artefact of the running recipe is now."""
        self._placed[value] = placed

    def know(self, found: ResolvedInput) -> None:
        """Take over an input that was found before, so that it is not read again."""
        self._found[found.kind, found.value] = found

    def once(self, found: ResolvedInput, by: K, change: Callable[[ResolvedInput, K], ResolvedInput]) -> ResolvedInput:
        """An input changed by something, which is done once for all stages that ask for the same."""
        key = (replace(found, place=""), by)
        if key not in self._changed:
            self._changed[key] = change(found, by)
        return replace(self._changed[key], place=found.place)

    def read_ahead(self, fields: Sequence[InputField], meanwhile: Callable[[], object] = lambda: None) -> None:
        """Hash the weights of all local models side by side; each is then known when its turn comes.

        `meanwhile` is called while they are read: hashing needs no interpreter.
        """
        names = {part for f in fields if f.kind == "model" for part in (f.value, *f.value.split("+"))}
        folders = sorted({p for name in names if (p := Path(os.path.expanduser(name))).is_dir()})
        files = [p for folder in folders for p in sorted(folder.glob("*.safetensors")) if not p.is_symlink()]
        if len(folders) > 1:
            with ThreadPoolExecutor(1) as crew:
                hashed = crew.submit(sha256_files, files)
                meanwhile()
                hashed.result()

    def resolve(self, field: InputField) -> ResolvedInput:
        """Return the input; SourceError names what was looked for."""
        key = (field.kind, field.value)
        here = self._placed.get(field.value)
        if here is None and field.value in self._pending:
            return ResolvedInput(field.place, field.kind, field.value, (), f"stage:{self._pending[field.value]}", 0)
        if key not in self._found:
            self._found[key] = self._look(field, here)
        return replace(self._found[key], place=field.place)

    def _look(self, field: InputField, here: Placed | None) -> ResolvedInput:
        if field.kind == "folder":
            return resolve_folder(field.value, field.place)
        if field.kind == "encoder":
            return resolve_encoder(field.value, field.place)
        if field.kind in ("file", "scores"):
            file = here.file if here and field.kind == "file" else "."
            value = str(here.path / file) if here else field.value
            found = resolve_file(value, field.place, scores=field.kind == "scores")
            value = here.shown if here and here.shown else field.value
            return replace(found, kind=field.kind, value=value, relative=here.relative if here else None)
        look = {"rows": resolve_rows, "adapter": resolve_adapter}.get(field.kind, resolve_model)
        try:
            if here is None:
                return look(field.value, field.place, fetch=self._fetch)
            found = look(str(here.path), field.place, known=here.fingerprint)
        except NotCachedError:
            return ResolvedInput(field.place, field.kind, field.value, (), "", 0, missing=True)
        value = here.shown or field.value
        files = tuple(replace(f, label=f.label.replace(str(here.path), value, 1)) for f in found.files)
        return replace(found, value=value, relative=here.relative, files=files)


def resolve_folder(value: str, place: str) -> ResolvedInput:
    """Resolve a folder of small files, fingerprinted by all of them."""
    folder = Path(os.path.expanduser(value))
    if not folder.is_dir():
        raise SourceError(f"{place} {value!r}: no such folder")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digest = combine_digests({p.relative_to(folder).as_posix(): sha256_file(p) for p in files})
    return ResolvedInput(place, "folder", value, (folder.resolve(),), digest, sum(p.stat().st_size for p in files))


def resolve_encoder(value: str, place: str) -> ResolvedInput:
    """Resolve an encoder: a folder by its content, a hub id by its name, for its package fetches it."""
    path = Path(os.path.expanduser(value))
    if path.is_dir() or value.startswith((".", "/", "~")):
        return replace(resolve_folder(value, place), kind="encoder")
    return ResolvedInput(place, "encoder", value, (), combine_digests({"encoder": value}), 0)


def resolve_file(value: str, place: str, *, scores: bool = False) -> ResolvedInput:
    """Resolve one file, fingerprinted by its content; for `scores`, a selection stands for its own."""
    path = Path(os.path.expanduser(value))
    if scores and (path.is_dir() or path.name.startswith("selected.")):
        path = (path if path.is_dir() else path.parent) / "scores.parquet"
    if not path.is_file():
        raise SourceError(f"{place} {value!r}: no such file")
    return ResolvedInput(place, "file", value, (path.resolve(),), sha256_file(path), path.stat().st_size)


def resolve_rows(value: str, place: str = "rows", *, known: str | None = None, fetch: bool = True) -> ResolvedInput:
    """Resolve one ROWS argument to its files; `known` is their fingerprint if already computed."""
    files = resolve_sources([value], fetch_hub=lambda name: _hub("fetch_dataset", name, fetch)[0])
    paths = tuple(f.path for f in files if f.format != "lab")
    size = sum(p.stat().st_size for p in paths)
    for path in paths if known is None else ():
        if load_manifest(path.parent) and (damaged := _differs(path.parent, {path.name: sha256_file(path)})):
            raise SourceError(damaged)
    return ResolvedInput(place, "rows", value, paths, known or fingerprint(files), size, files)


def resolve_model(value: str, place: str = "model", *, known: str | None = None, fetch: bool = True) -> ResolvedInput:
    """Resolve one MODEL argument to a local folder; a hub id is fetched or found in the cache.

    `base+adapter` is an adapter on a base of the user's choice.
    """
    first, plus, last = value.rpartition("+")
    if plus and first and not Path(os.path.expanduser(value)).is_dir():
        return _on_base(value, place, resolve_model(first, fetch=fetch), resolve_adapter(last, place, fetch=fetch))
    path, revision = _locate_model(value, fetch)
    names = model_files(path)
    size = sum((path / n).stat().st_size for n in names)
    base = None
    if "adapter_config.json" in names and (name := adapter_base(path)):
        base = _locate_model(name, fetch)[0]
        if (base / "adapter_config.json").exists():
            raise SourceError(f"{path}: its base {name!r} is an adapter too; merge that one into its base first")
    digest = known or _model_fingerprint(path, names)
    return ResolvedInput(place, "model", value, (path,), digest, size, revision=revision, base=base)


def _on_base(value: str, place: str, base: ResolvedInput, adapter: ResolvedInput) -> ResolvedInput:
    if base.base is not None:
        raise SourceError(f"{place} {value!r}: {base.value!r} is an adapter too; merge that one into its base first")
    digest = combine_digests({"adapter": adapter.fingerprint, "base": base.fingerprint})
    size = adapter.size + base.size
    return ResolvedInput(
        place, "model", value, adapter.paths, digest, size, revision=adapter.revision, base=base.paths[0]
    )


def resolve_adapter(value: str, place: str, *, known: str | None = None, fetch: bool = True) -> ResolvedInput:
    """Resolve an adapter folder without its base, which need not be here."""
    path, revision = _locate_model(value, fetch)
    names = model_files(path)
    if "adapter_config.json" not in names:
        raise SourceError(f"{place} {value!r}: no adapter_config.json, so it is no adapter; give PEFT adapter folders")
    digests = {name: _digest(path / name) for name in names}
    if known is None and (damaged := _differs(path, digests)):
        raise CheckpointError(damaged)
    size = sum((path / n).stat().st_size for n in names)
    return ResolvedInput(place, "adapter", value, (path,), known or combine_digests(digests), size, revision=revision)


def _hub(function: str, name: str, fetch: bool) -> tuple[Path, str]:
    located: tuple[Path, str] = load_target(f"honeloom.backends.hub:{function}")(name, fetch=fetch)
    return located


def _locate_model(value: str, fetch: bool) -> tuple[Path, str | None]:
    if value == "lab:base":
        return lab.base_path(), None
    if any(ord(c) < 32 for c in value) or not value:
        raise SourceError(f"model {value!r}: control characters are not allowed in a model's name")
    path = Path(os.path.expanduser(value))
    if path.is_dir():
        _refuse_pickles(path)
        if not _DESCRIBED_BY.intersection(model_files(path)):
            raise SourceError(_not_a_model(path))
        return path.resolve(), None
    looks_like_path = (
        value.startswith((".", "/", "~")) or path.suffix in {".safetensors", ".json"} or os.sep * 2 in value
    )
    if path.exists() or looks_like_path or not _HUB_ID.fullmatch(value):
        raise SourceError(
            f"model {value!r}: no such folder; give a Hugging Face model folder, a hub id like org/name, or lab:base"
        )
    return _hub("fetch_model", value, fetch)


def _not_a_model(path: Path) -> str:
    held = sorted(p.name for p in path.iterdir())[:8]
    return (
        f"model {str(path)!r}: no config.json or adapter_config.json (found {', '.join(held) or 'nothing'}); "
        "a model folder has config.json and *.safetensors, an adapter folder adapter_config.json"
    )


def _refuse_pickles(folder: Path) -> None:
    """Say early, and to every verb that computes, that weights which exist only as pickles are not read."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"model {str(folder)!r}: {pickles[0]} is pickled, and pickles may hold code: honeloom never reads them, "
            f"only safetensors; make them with `honeloom convert {folder} OUT`, which runs no code of the file"
        )


def model_files(folder: Path) -> list[str]:
    """Names of the files that make up a model or adapter, and of an evaluation's rows.

    A mixture of whole models has the tokenizers of its models besides, as `tokenizers/<name>/<file>`.
    """
    names = [p.name for p in folder.iterdir() if _MODEL_FILES.search(p.name) and p.is_file()]
    places = sorted(folder.glob("tokenizers/*/*"))
    if places and "config.json" in names and read_config(folder).get("model_type") == "honeloom_models":
        names += [p.relative_to(folder).as_posix() for p in places if _MODEL_FILES.search(p.name) and p.is_file()]
    return sorted(names)


def _model_fingerprint(folder: Path, names: Sequence[str], base: str | None = None) -> str:
    digests = {name: _digest(folder / name) for name in names}
    if damaged := _differs(folder, digests):
        raise CheckpointError(damaged)
    if "adapter_config.json" in names and (name := adapter_base(folder)):
        digests["base"] = base or base_fingerprint(name)
    return combine_digests(digests)


def base_fingerprint(name: str) -> str:
    """Fingerprint of an adapter's base as far as it is here; of its name alone if it is not, for nothing is fetched."""
    try:
        found = resolve_model(name, fetch=False)
    except SourceError:
        return combine_digests({"name": name})
    return found.fingerprint


def _differs(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Say which of these files is not the one that the folder's manifest lists, if it has a sound one."""
    manifest = load_manifest(folder)
    listed: Mapping[str, Any] = manifest["files"] if manifest else {}
    for name, digest in digests.items():
        if name in listed and listed[name]["sha256"] != digest:
            return (
                f"{folder / name}: damaged or changed since honeloom wrote it (its SHA-256 is not the manifest's); "
                "restore the file or make the result again"
            )
    return None


def adapter_base(folder: Path) -> str | None:
    """The base of an adapter: beside it in the same run if it was made there, else as recorded.

    A hub id comes with the revision that the adapter was trained on, as `org/name@revision`.
    """
    for entry in recorded_inputs(folder):
        beside = folder / entry["relative"] if entry["relative"] else None
        if beside is None or not beside.is_dir():
            continue
        if entry["place"] in ("model", "base"):  # the latter's name where an adapter was extracted
            return str(beside.resolve())
        if entry["kind"] == "adapter":  # aggregated: its base is theirs
            return adapter_base(beside.resolve())
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
    except ValueError as error:
        raise SourceError(f"{folder / 'adapter_config.json'}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise SourceError(f"{folder / 'adapter_config.json'}: holds a {type(settings).__name__}, not an object")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        return None
    name = str(base)
    pinned = revision and "@" not in name and _HUB_ID.fullmatch(name) and not Path(name).is_dir()
    return f"{name}@{revision}" if pinned else name


def recorded_inputs(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a stage's `inputs.json`; none where there is no such file of ours."""
    try:
        document = json.loads((folder / "inputs.json").read_bytes())
    except (OSError, ValueError):
        return []
    ours = isinstance(document, dict) and document.get("schema") == INPUTS_SCHEMA
    return list(document.get("inputs", [])) if ours else []


def _digest(path: Path) -> str:
    """SHA-256 of a file; the hub's cache already names large files by it."""
    if path.is_symlink():
        name = Path(os.readlink(path)).name
        if len(name) == 64 and all(c in "0123456789abcdef" for c in name):
            return name
    return sha256_file(path)


def artefact_fingerprint(path: Path, *, base: str | None = None) -> str:
    """Fingerprint of what a stage has just written, equal to what `resolve_model` would find.

    For a file it is the SHA-256 of its content; for an adapter it covers the base model too, whose
    fingerprint is `base` where the stage has read it.
    """
    if path.is_file():
        return sha256_file(path)
    return _model_fingerprint(path, model_files(path), base)
