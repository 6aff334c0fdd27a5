"""The lineage of a run as a drawing: rows and models on top, stages in order, an arc for all that is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honeloom.reporting.records import input_label
from honeloom.reporting.text import clip
from honeloom.types.report import Report

__all__ = ["LineageGraph", "lineage_graph"]

ROW, GUTTER, DOT = 38, 88, 6
"""Pixels: height of a node's line, width of the part with the arcs, radius of a node."""
SHOWN = 60
"""Nodes that a drawing has room for."""
_LABEL = 30


@dataclass(frozen=True, slots=True)
class Mark:
    """One node: where it stands, its name, what it is, its shape (rows, model, stage or result), what it reads."""

    y: int
    label: str
    kind: str
    shape: str
    reads: str


@dataclass(frozen=True, slots=True)
class LineageGraph:
    """What the template draws; `described` says the same in sentences, `links` as (what reads, what is read)."""

    marks: Sequence[Mark]
    arcs: Sequence[str]
    described: str
    links: Sequence[tuple[str, str]]
    left_out: int
    gutter: int = GUTTER
    dot: int = DOT

    @property
    def height(self) -> int:
        """Of the drawing, in pixels."""
        return ROW * len(self.marks)


@dataclass(frozen=True, slots=True)
class _Node:
    key: str
    label: str
    kind: str
    shape: str


def lineage_graph(folder: Path, report: Report) -> LineageGraph | None:
    """The drawing of a run's lineage; the variants of a sweep are one node. None for a single stage.

    Parameters
    ----------
    folder : Path
        Of the run, with its `inputs.json`.
    report : Report
        Of the run.
    """
    path = folder / "inputs.json"
    stages = report.details.get("stages", ())
    if report.verb != "run" or not stages or not path.exists():
        return None
    reads: Mapping[str, Any] = json.loads(path.read_bytes())["stages"]
    nodes, links = _read(stages, reads)
    shown = nodes[:SHOWN]
    place = {node.key: i for i, node in enumerate(shown)}
    drawn = [(place[a], place[b]) for a, b in links if a in place and b in place]
    longest = max((b - a for a, b in drawn), default=1)
    labels = {node.key: node.label for node in nodes}
    by_stage = {key: ", ".join(labels[a] for a, b in links if b == key) for key in dict.fromkeys(b for _, b in links)}
    return LineageGraph(
        [
            Mark(ROW * i + ROW // 2, clip(n.label, _LABEL), n.kind, n.shape, clip(by_stage.get(n.key, ""), 120))
            for i, n in enumerate(shown)
        ],
        [_arc(a, b, longest) for a, b in drawn],
        clip(". ".join(f"{labels[key]} reads {read}" for key, read in by_stage.items()), 4000),
        [(labels[b], labels[a]) for a, b in links],
        len(nodes) - len(shown),
    )


def _read(stages: Sequence[Mapping[str, Any]], reads: Mapping[str, Any]) -> tuple[list[_Node], list[tuple[str, str]]]:
    """Sources and stages, and links (what is read, what reads)."""
    sources: dict[str, _Node] = {}
    links: dict[tuple[str, str], None] = {}
    made: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        made.setdefault(_base(stage["name"]), []).append(stage)
        for entry in reads.get(stage["name"], ()):
            within = str(entry["sha256"]).removeprefix("stage:")
            if within != entry["sha256"]:
                links[f"stage {_base(within)}", f"stage {_base(stage['name'])}"] = None
                continue
            shape = "rows" if entry["kind"] in ("rows", "file", "scores") else "model"
            key = f"{shape} {entry['sha256'] or entry['value']}"
            sources.setdefault(key, _Node(key, input_label(entry), shape, shape))
            links[key, f"stage {_base(stage['name'])}"] = None
    read = {a for a, _ in links}
    nodes = []
    for name, variants in made.items():
        times = f" × {len(variants)}" if len(variants) > 1 else ""
        shape = "stage" if f"stage {name}" in read else "result"
        nodes.append(_Node(f"stage {name}", name, f"{variants[0]['verb']}{times}", shape))
    ordered = sorted(sources.values(), key=lambda n: (n.shape != "rows", list(sources).index(n.key)))
    return [*ordered, *nodes], list(links)


def _base(name: str) -> str:
    """The stage that a variant of a sweep is of."""
    return name.partition(".")[0]


def _arc(start: int, end: int, longest: int) -> str:
    """An SVG path from one node's line to a later one's, bulging to the left, the farther the wider."""
    y, below = ROW * start + ROW // 2, ROW * end + ROW // 2
    x = GUTTER - DOT - 2
    bulge = 22 + (GUTTER * 1.1 - 22) * (end - start - 1) / max(1, longest - 1)
    return f"M{x},{y} C{x - bulge:.0f},{y} {x - bulge:.0f},{below} {x},{below}"
