"""What stands at the end of a page: inputs by hash, settings, cost, environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import Panel
from honeloom.reporting.text import seconds, size
from honeloom.types.report import Report

__all__ = ["Inputs", "Records", "input_label", "read_inputs", "read_records"]

Inputs = Mapping[str, str]
"""What a stage reads: place in its settings -> short name."""


@dataclass(frozen=True, slots=True)
class Records:
    """The last part of a page; `settings` is the resolved recipe as YAML, empty where there is none."""

    inputs: Panel | None
    cost: Panel
    environment: Panel | None
    settings: str


def read_inputs(folder: Path) -> Inputs:
    """Names of a stage's inputs from its `inputs.json`: a stage's name within a run, else the end of the path."""
    document = _json(folder / "inputs.json")
    return {i["place"]: input_label(i) for i in document.get("inputs", [])}


def read_records(folder: Path, report: Report, stages: Sequence[tuple[str, Report]] = ()) -> Records:
    """Read the side files of a folder.

    Parameters
    ----------
    folder : Path
        With `inputs.json`, `environment.json` and `recipe.lock.yaml`; what is missing is left out.
    report : Report
        Of the folder.
    stages : sequence of (name, Report)
        Of a run, for the cost of each.
    """
    lock = folder / "recipe.lock.yaml"
    return Records(
        inputs=_inputs(_json(folder / "inputs.json"), {n: r.artefact.sha256 for n, r in stages if r.artefact}),
        cost=_cost(report, stages),
        environment=_environment(_json(folder / "environment.json")),
        settings=lock.read_text(encoding="utf-8") if lock.exists() else "",
    )


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def input_label(found: Mapping[str, Any]) -> str:
    """What to call an entry of `inputs.json`: a stage's name within a run, else the end of the path."""
    name = Path(found["value"]).name or found["value"]
    return name.partition("-")[2] if found["relative"] else name if found["paths"] else found["value"]


def _inputs(document: Mapping[str, Any], made: Mapping[str, str]) -> Panel | None:
    """The table of inputs; within a run, what an earlier stage `made` is named `$stage`."""
    by_stage = document.get("stages") or {"": document.get("inputs", [])}
    rows = [
        (stage, i["place"], what, i["revision"] or "", size(i["bytes"]) if i["bytes"] else "", sha256)
        for stage, found in by_stage.items()
        for i in found
        for what, sha256 in [_origin(i, made)]
    ]
    if not rows:
        return None
    columns = ("stage", "input", "what", "revision", "size", "sha256")
    bare = [k for k in (3, 4) if not any(r[k] for r in rows)] + ([0] if list(by_stage) == [""] else [])
    kept = [k for k in range(len(columns)) if k not in bare]
    return Panel(
        title="Inputs",
        columns=[columns[k] for k in kept],
        rows=[[r[k] for k in kept] for r in rows],
        note="Every input by the hash of its content; honeloom lineage follows them.",
        file="inputs.json",
    )


def _origin(found: Mapping[str, Any], made: Mapping[str, str]) -> tuple[str, str]:
    """What to call an input, and its hash; a run lists its stages' artefacts before they are made."""
    stage = found["sha256"].removeprefix("stage:")
    if stage != found["sha256"]:
        return f"${stage}", made.get(stage, "")
    return (f"${input_label(found)}" if found["relative"] else str(found["value"])), found["sha256"]


def _cost(report: Report, stages: Sequence[tuple[str, Report]]) -> Panel:
    rows = [
        (name, seconds(r.cost.seconds), seconds(r.cost.cpu_seconds), size(r.cost.peak_rss_bytes), str(r.seed))
        for name, r in [*stages, ("all" if stages else report.verb, report)]
    ]
    return Panel(
        title="Cost",
        columns=("stage", "time", "processor time", "peak memory", "seed"),
        rows=rows,
        note="Peak memory is that of the whole process up to the end of the stage." if stages else "",
    )


def _environment(document: Mapping[str, Any]) -> Panel | None:
    rows = [(k, str(v)) for k, v in document.items() if not isinstance(v, dict | list)]
    rows += [(k, str(v)) for part in ("packages", "variables") for k, v in document.get(part, {}).items()]
    return Panel("Environment", ("what", "value"), rows, file="environment.json") if rows else None
