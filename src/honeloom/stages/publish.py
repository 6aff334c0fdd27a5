"""Push a finished result to the hub: what goes up is what was proven, without the paths of this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from honeloom import __version__
from honeloom.errors import HubError, VerificationError
from honeloom.registry import load_target
from honeloom.runs.log import Console, QuietConsole
from honeloom.runs.manifest import MANIFEST, find_damage, load_manifest, render_manifest
from honeloom.stages.inputs import adapter_base, model_files, recorded_inputs
from honeloom.stages.runner import load_report

__all__ = ["check_push", "check_repository", "push_result"]

RECORDS = (
    "README.md", "report.json", "recipe.lock.yaml", "inputs.json", "environment.json",
    "merge.yaml", "drop_plan.json", "scores.json",
)  # fmt: skip
"""What is pushed beside the model's own files; row records, events and the page stay here."""


def check_repository(repository: str) -> None:
    """Make sure that it has the form `org/name`, without a connection; raises as `backends.hub.check_repository`."""
    load_target("honeloom.backends.hub:check_repository")(repository)


def check_push(repository: str) -> None:
    """Make sure that a result can be pushed there, before any work; raises as `backends.hub.check_push`."""
    load_target("honeloom.backends.hub:check_push")(repository)


def push_result(out: Path, repository: str, console: Console | None = None) -> None:
    """Push a published result, freshly made or reused.

    Every file is compared with the manifest first. The model's files go up byte for byte. In the
    records, absolute paths give way to the last part of each, so that no folder of this machine
    is told; the manifest that goes up fits them.

    Parameters
    ----------
    out : Path
        The result's folder.
    repository : str
        `org/name`; a new one is private.
    console : Console, optional
        Where messages go; silent by default.

    Raises
    ------
    VerificationError
        A file is not as the manifest says; nothing is pushed.
    HubError
        The upload failed; the result stands complete in `out`.
    """
    console = console or QuietConsole()
    manifest = load_manifest(out)
    damage = find_damage(out)
    if manifest is None or damage is not None:
        reason = f"{damage.file} is damaged ({damage.problem})" if damage else "it has no sound manifest"
        raise VerificationError(f"{out}: not pushed: {reason}; repeat the command with --resume to make it again")
    if (out / "adapter_config.json").exists() and (base := adapter_base(out)) and Path(base).is_absolute():
        console.warn(
            f"adapter_config.json names its base by a path of this machine, {base}: readers of {repository} cannot "
            "load it; tune from a hub id instead"
        )
    console.say(f"pushing {out} to {repository}; a new repository is private")
    try:
        message = f"honeloom {manifest['verb']} {__version__}"
        page = load_target("honeloom.backends.hub:push")(repository, list(_files(out, manifest)), message)
    except HubError as error:
        raise HubError(
            f"{error}; the result stands complete in {out}: repeat the command with --resume --push-to-hub {repository}"
        ) from None
    console.say(f"pushed: {page}")


def _files(out: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, Path | bytes]]:
    """The model's files as paths, the records and a fitting manifest as content."""
    places = _places(out)
    listed = {}
    for name in (n for n in (*model_files(out), "model.gguf") if n in manifest["files"]):
        listed[name] = manifest["files"][name]
        yield name, out / name
    for name in (n for n in RECORDS if n in manifest["files"]):
        content = _without_paths(name, (out / name).read_text(encoding="utf-8"), places).encode()
        listed[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        yield name, content
    yield MANIFEST, render_manifest({**manifest, "files": dict(sorted(listed.items()))})


def _places(out: Path) -> dict[str, str]:
    """Absolute paths that the records may hold -> what stands for them."""
    report = load_report(out)
    found = {str(out), report.out, report.artefact.path if report.artefact else None}
    for entry in recorded_inputs(out):
        found |= {*entry["paths"], entry["value"]}
    short = {p: PurePath(p).name for p in found if p and PurePath(p).is_absolute()}
    return {str(Path.home()): "~", **short}


def _without_paths(name: str, text: str, places: dict[str, str]) -> str:
    if name.endswith(".json"):
        document = _shorten(json.loads(text), places)
        for entry in document.get("inputs", []) if name == "inputs.json" else ():
            entry["paths"] = []  # they mean nothing to a reader
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if name == "README.md":
        cell = load_target("honeloom.reporting.card:cell")
        places = places | {cell(place): cell(short) for place, short in places.items()}
    return str(_shorten(text, places))


def _shorten(value: Any, places: dict[str, str]) -> Any:
    """Replace whole paths in every text of plain data, the longest first; "/data" is no part of "org/data"."""
    if isinstance(value, dict):
        return {k: _shorten(v, places) for k, v in value.items()}
    if isinstance(value, list):
        return [_shorten(v, places) for v in value]
    if not isinstance(value, str):
        return value
    known = "|".join(re.escape(p) for p in sorted(places, key=len, reverse=True) if p != PurePath(p).anchor)
    return re.sub(rf"(?<![\w.-])({known})(?![\w-])", lambda m: places[m[1]], value) if known else value
