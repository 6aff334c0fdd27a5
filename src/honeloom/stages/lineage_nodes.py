"""The results that lie in a folder, and which of them were made from which, by content and by place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from honeloom.config.load import load_yaml
from honeloom.errors import SourceError
from honeloom.runs.keys import combine_digests
from honeloom.runs.manifest import MANIFEST, load_manifest
from honeloom.stages.inputs import model_files, recorded_inputs
from honeloom.stages.runner import load_report
from honeloom.types.report import Report

__all__ = ["Graph", "Node", "inputs_of", "lock_of", "open_graph", "results_below"]

_DEPTH = 4
"""Folders below the one named in which results are looked for."""


@dataclass(frozen=True)
class Node:
    """One result: its folder, its name in answers, and the run it is a stage of (or None).

    `outside` is true for a result that was found only because another one was made from it.
    """

    folder: Path
    name: str
    run: Path | None
    outside: bool = False

    @cached_property
    def report(self) -> Report:
        """What it says of itself."""
        return load_report(self.folder)

    @cached_property
    def reads(self) -> list[dict[str, Any]]:
        """What it was made from: the entries of its `inputs.json`."""
        return recorded_inputs(self.folder)

    @property
    def sha256(self) -> str:
        """Of its artefact."""
        return self.report.artefact.sha256 if self.report.artefact else ""

    @cached_property
    def digests(self) -> frozenset[str]:
        """Every fingerprint under which another stage may have read it, or a file of it."""
        manifest = load_manifest(self.folder)
        files: Mapping[str, Any] = manifest["files"] if manifest else {}
        found = {self.sha256, *(entry["sha256"] for entry in files.values())} - {""}
        rows = {hashlib.sha256(bytes.fromhex(entry["sha256"])).hexdigest() for entry in files.values()}
        model = {name: files[name]["sha256"] for name in model_files(self.folder) if name in files}
        return frozenset(found | rows | ({combine_digests(model)} if model else set()))


def inputs_of(entry: Mapping[str, Any], node: Node) -> list[Path]:
    """Files or folders that an entry of `inputs.json` names, whether they still exist or not."""
    if entry["relative"]:
        return [(node.folder / entry["relative"]).resolve()]
    parts = [Path(os.path.realpath(os.path.expanduser(p))) for p in str(entry["value"]).split("+")]
    return [*(Path(os.path.realpath(p)) for p in entry["paths"]), *(p for p in parts if p.exists())]


class Graph:
    """Results and the links between them.

    Parameters
    ----------
    nodes : sequence of Node
        In the order in which answers list them.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self.parents = {node: self._parents(node) for node in self.nodes}

    def _parents(self, node: Node) -> dict[Node, list[str]]:
        """Results that it read -> the places in its settings, by where they lie or by their content."""
        found: dict[Node, list[str]] = {}
        for entry in node.reads:
            places = inputs_of(entry, node)
            for other in self.nodes:
                if other is node:
                    continue
                lies = any(p == other.folder or other.folder in p.parents for p in places)
                if lies or (not entry["relative"] and entry["sha256"] in other.digests):
                    found.setdefault(other, []).append(entry["place"])
        return found

    def closure(self, direct: Mapping[Node, str]) -> dict[Node, str]:
        """Everything that some results touched, directly or through later ones: how, node by node, parents first."""
        touched = dict(direct)
        order = self.order()
        changed = True
        while changed:  # copies of one content may read each other's, so one pass may not do
            changed = False
            for node in order:
                names = [p.name for p in self.parents[node] if p in touched]
                if names and node not in touched:
                    touched[node] = f"through {', '.join(dict.fromkeys(names))}"
                    changed = True
        return {node: touched[node] for node in order if node in touched}

    def ancestors(self, node: Node) -> list[Node]:
        """What it was made from, however far back, in order."""
        seen: set[Node] = set()
        stack = [node]
        while stack:
            for parent in self.parents[stack.pop()]:
                if parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return [n for n in self.order() if n in seen and n is not node]

    def order(self) -> list[Node]:
        """All nodes, what was read before what read it."""
        done: dict[Node, None] = {}
        for start in self.nodes:
            stack = [(start, iter(self.parents[start]))]
            open_ = {start}
            while stack:
                node, rest = stack[-1]
                following = next((p for p in rest if p not in done and p not in open_), None)
                if following is not None:
                    open_.add(following)
                    stack.append((following, iter(self.parents[following])))
                    continue
                stack.pop()
                done.setdefault(node)
        return list(done)


def open_graph(path: Path) -> Graph:
    """Read a run folder, one result, or a folder of them; and what these were made from, as far as it exists.

    Raises
    ------
    SourceError
        There is no such folder, or no finished result in it.
    """
    if not path.is_dir():
        raise SourceError(f"{path}: no such folder; give the one that --output-dir named")
    path = path.resolve()
    found = [path] if load_manifest(path) else results_below(path)
    if not found:
        raise SourceError(
            f"{path} is not a finished honeloom result (no sound manifest.json), and holds none; give the folder that "
            "--output-dir named, or one that holds such folders"
        )
    several = found != [path]
    nodes = [node for folder in found for node in _nodes(folder, path if several else None)]
    return Graph([*nodes, *_outside(nodes)])


def results_below(folder: Path) -> list[Path]:
    """Finished results in a folder, up to four folders deep; what lies within one is no result of its own."""
    return [p for p in _results(folder, _DEPTH) if p != folder]


def _results(folder: Path, depth: int) -> Iterator[Path]:
    if load_manifest(folder):
        yield folder
        return
    if depth:
        for child in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield from _results(child, depth - 1)


def _nodes(folder: Path, top: Path | None, *, outside: bool = False) -> Iterator[Node]:
    """The stages of a run in order, or one result by the name of its verb; below a `top`, by its path there."""
    stages = stage_folders(folder)
    shown = "" if top is None else folder.relative_to(top).as_posix() if folder.is_relative_to(top) else str(folder)
    for stage in stages:
        name = stage.name.split("-", 1)[-1]
        yield Node(stage, f"{shown}/{name}" if shown else name, folder, outside)
    if not stages:
        yield Node(folder, shown or load_report(folder).verb, None, outside)


def stage_folders(run: Path) -> list[Path]:
    """The stages of a run, in order; none of a single result."""
    found = [p for p in (run / "stages").glob("*-*") if (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: (int(p.name.split("-")[0]), p.name))


def _outside(nodes: Sequence[Node]) -> list[Node]:
    """Results elsewhere that these were made from, and so on, as far as the folders still exist."""
    known = {node.folder for node in nodes}
    found: list[Node] = []
    stack = list(nodes)
    while stack:
        node = stack.pop(0)
        for entry in node.reads:
            for place in inputs_of(entry, node):
                folder = next((p for p in (place, *place.parents) if (p / MANIFEST).is_file()), None)
                if folder is None or folder in known or load_manifest(folder) is None:
                    continue
                known.add(folder)
                run = next((p for p in folder.parents if (p / "stages") == folder.parent), None)
                new = Node(folder, str(folder), run, outside=True)
                if not stage_folders(folder) and (folder / "report.json").is_file():
                    found.append(new)
                    stack.append(new)
    return found


def lock_of(node: Node) -> dict[str, Any]:
    """The resolved settings of a result."""
    stages = load_yaml(node.folder / "recipe.lock.yaml")["stages"]
    verb = node.report.verb
    return dict(stages[verb][verb])
