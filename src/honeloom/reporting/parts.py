"""The stages that a report speaks of, each with its verdict: what page and card are made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from honeloom.reporting.records import read_inputs
from honeloom.reporting.verdict import Verdict, describe, describe_run
from honeloom.types.report import Report

__all__ = ["WARNINGS", "Part", "overall_verdict", "read_parts", "warnings_of"]

WARNINGS = 6
"""Warnings that stand open on a page; the rest unfolds."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stage: where it lies, the anchor of its section, its name."""

    folder: Path
    anchor: str
    title: str
    report: Report
    verdict: Verdict


def read_parts(folder: Path, report: Report) -> list[Part]:
    """The stages of a run in order, or the one stage that the report is of."""
    if report.verb != "run":
        return [Part(folder, "result", "Result", report, describe(report, read_inputs(folder)))]
    parts = []
    for number, stage in enumerate(report.details.get("stages", ()), 1):
        place = folder / "stages" / Path(stage["out"]).name
        inner = Report.from_json(json.loads((place / "report.json").read_bytes()))
        verdict = describe(inner, read_inputs(place))
        parts.append(Part(place, f"stage-{number}", stage["name"], inner, verdict))
    return parts


def overall_verdict(report: Report, parts: Sequence[Part]) -> Verdict:
    """The verdict of the whole."""
    if report.verb != "run":
        return parts[0].verdict
    entries = zip(parts, report.details["stages"], strict=True)
    return describe_run([(p.report, p.verdict) for p, entry in entries if not entry.get("without")], report)


def warnings_of(report: Report) -> list[str]:
    """What was warned of; in a run once for all stages, and variants of them, that say the same."""
    if report.verb != "run":
        return list(report.warnings)
    stages: dict[str, list[str]] = {}
    for warning in report.warnings:
        stage, _, text = warning.partition(": ")
        stages.setdefault(text, []).append(stage)
    said = []
    for text, names in stages.items():
        alone = [n for n in dict.fromkeys(names) if n.partition(".")[0] == n or n.partition(".")[0] not in names]
        said.append(f"{', '.join(alone)}: {text}")
    return said
