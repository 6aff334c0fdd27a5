"""Merge files: one YAML document, several that build on each other, or the recipe in a merged model's card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.config.load import dump_yaml, read_yaml
from honeloom.errors import ConfigError, SourceError

__all__ = ["in_order", "parts_folder", "read_card", "write_recipe"]

_NAME = re.compile(r"[\w][\w.-]*")
_FENCE, _MARK = "````", "honeloom-merge"
_RECIPE = re.compile(rf"^{_FENCE}yaml {_MARK}\n(.*?)^{_FENCE}$", re.MULTILINE | re.DOTALL)
_MODEL_KEYS = ("model", "base_model", "models", "source")


def parts_folder(out: Path) -> Path:
    """Where the merges lie that a result is made of, one folder each; they are used again when nothing changed."""
    return out.with_name(f"{out.name}-parts")


def in_order(documents: Sequence[Mapping[str, Any]], parts: Path) -> list[tuple[str | None, dict[str, Any]]]:
    """Order documents so that each comes after those it names, and put the folders of these in place of their names.

    Parameters
    ----------
    documents : sequence of mapping
        Each but one has a `name`; the one without is the result (the last one if all have one).
    parts : Path
        Folder for the others.

    Returns
    -------
    list of (str or None, dict)
        Name and settings; the last is the result.

    Raises
    ------
    ConfigError
        Two results or two of one name, a name that cannot be a folder, or documents that name each other in a circle.
    """
    if len(documents) == 1:
        return [(None, {k: v for k, v in documents[0].items() if k != "name"})]
    unnamed = [i for i, d in enumerate(documents) if d.get("name") is None]
    if len(unnamed) > 1:
        raise ConfigError(f"{len(unnamed)} documents have no name; only the result goes without one")
    final = unnamed[0] if unnamed else len(documents) - 1
    named: dict[str, Mapping[str, Any]] = {}
    for i, document in enumerate(documents):
        name = document.get("name")
        if i == final:
            continue
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"name {name!r}: a document's name has letters, digits, '_', '.' and '-' only")
        if name in named:
            raise ConfigError(f"two documents have the name {name!r}")
        named[name] = document
    ordered: list[str] = []
    for name in named:
        _visit(name, named, ordered, ())
    places = {name: str(parts / name) for name in named}
    last = documents[final]
    used = [n for n in ordered if _reaches(n, last, named)]
    return [*((n, _placed(named[n], places)) for n in used), (None, _placed(last, places))]


def _visit(name: str, named: Mapping[str, Mapping[str, Any]], ordered: list[str], path: tuple[str, ...]) -> None:
    if name in ordered:
        return
    if name in path:
        raise ConfigError(f"documents name each other in a circle: {' -> '.join((*path, name))}")
    for other in _references(named[name]):
        if other in named:
            _visit(other, named, ordered, (*path, name))
    ordered.append(name)


def _reaches(name: str, document: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> bool:
    found = _references(document)
    return name in found or any(other in named and _reaches(name, named[other], named) for other in found)


def _references(node: Any) -> set[str]:
    """Every text of a document that a model's name could be."""
    if isinstance(node, str):
        return {node}
    if isinstance(node, Mapping):
        values: Iterable[Any] = [value for key, value in node.items() if key != "name"]
    else:
        values = node if isinstance(node, list) else ()
    return {text for value in values for text in _references(value)}


def _placed(node: Any, places: Mapping[str, str], key: str = "") -> Any:
    """Names of documents become paths, wherever a model stands."""
    if isinstance(node, Mapping):
        return {k: _placed(v, places, str(k)) for k, v in node.items() if k != "name"}
    if isinstance(node, list):
        return [_placed(v, places, key) for v in node]
    return places.get(node, node) if isinstance(node, str) and key in _MODEL_KEYS else node


def write_recipe(settings: Mapping[str, Any], inputs: Sequence[tuple[str, str, str]]) -> str:
    """The block of a model card that `read_card` reads: settings, and name and content hash of every model.

    Parameters
    ----------
    settings : mapping
        Content of merge.yaml.
    inputs : sequence of (str, str, str)
        Place in the settings, what to show of the model's name, and its content hash.
    """
    document = json.loads(json.dumps(settings))
    for place, shown, _ in inputs:
        _put(document, place.split("."), shown)
    document["inputs"] = {place: digest for place, _, digest in inputs}
    text = dump_yaml(document)
    return "" if _FENCE in text else f"{_FENCE}yaml {_MARK}\n{text}{_FENCE}"


def read_card(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The merge that a model card tells.

    Parameters
    ----------
    path : Path
        A README.md, or the folder it lies in. A card names models on this machine by the last part of their path
        alone; `inputs.json` beside it knows where they lay.

    Returns
    -------
    (dict, dict)
        Settings, and the content hashes of models and rows by their place in these.

    Raises
    ------
    SourceError
        There is no card, or it tells of no merge.
    """
    file = path / "README.md" if path.is_dir() else path
    if not file.is_file():
        raise SourceError(f"{path}: no README.md; give a merged model's folder or its card")
    found = _RECIPE.search(file.read_text(encoding="utf-8"))
    if found is None:
        raise SourceError(f"{file}: tells of no merge; only cards written by `honeloom merge` have its recipe")
    document = read_yaml(found[1], what=str(file))
    digests: dict[str, str] = dict(document.pop("inputs", None) or {})
    for place, folder in _recorded(file.with_name("inputs.json")).items():
        if place in digests:
            _put(document, place.split("."), folder)
    return document, digests


def _recorded(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    entries = json.loads(file.read_bytes()).get("inputs", [])
    lone = [e for e in entries if len(e.get("paths", ())) == 1]
    return {e["place"]: e["value"] if "+" in e["value"] else str(e["paths"][0]) for e in lone}  # base+adapter


def _put(node: Any, place: Sequence[str], value: str) -> None:
    for part in place[:-1]:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(place[-1]) if isinstance(node, list) else place[-1]] = value
