"""`README.md` beside every artefact: a Hugging Face card with parents, rows, verification and numbers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from honeloom import __version__
from honeloom.config.load import dump_yaml, load_yaml
from honeloom.merging.documents import write_recipe
from honeloom.reporting.licences import UNKNOWN, licence_warnings, only_licence
from honeloom.reporting.page import environment
from honeloom.reporting.panels.metrics import metrics_table
from honeloom.reporting.parts import overall_verdict, read_parts
from honeloom.reporting.run_panels import headline_panel
from honeloom.reporting.text import clip
from honeloom.runs.atomic import write_bytes
from honeloom.types.report import Report

__all__ = ["CardInput", "Facts", "cell", "write_card"]


class CardInput(Protocol):
    """What the card says of one input."""

    place: str
    kind: Any
    value: str
    fingerprint: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one source: licences; of rows how many (None: not counted), in how many files, and withdrawn."""

    licences: tuple[str, ...] = (UNKNOWN,)
    rows: int | None = None
    files: int = 0
    withdrawn: int = 0


def write_card(
    folder: Path,
    report: Report,
    inputs: Sequence[CardInput],
    relation: str | None = None,
    *,
    facts: Mapping[str, Facts] | None = None,
    parents: Sequence[str] = (),
) -> None:
    """Write the card of one artefact.

    Parameters
    ----------
    folder : Path
        Where `README.md` goes.
    report : Report
        Of the stage or run.
    inputs : sequence
        What it was made from.
    relation : str, optional
        adapter, finetune, merge or quantized, for a model: the hub builds its model tree from it.
    facts : mapping, optional
        Fingerprint of an input -> what is known of it.
    parents : sequence of str
        Hub models that it goes back to through results that are not on the hub.
    """
    sources = _sources(inputs, facts or {})
    union = _union(sources)
    env = environment()
    env.filters["cell"] = cell
    parts = read_parts(folder, report)
    text = env.get_template("card.md").render(
        front=dump_yaml(_front_matter(report, inputs, relation, parents, union)),
        title=f"{Path(report.out or '').name} ({report.verb})",
        verdict=overall_verdict(report, parts),
        scores=headline_panel([(p.title, p.report) for p in parts], report)
        if report.verb == "run"
        else metrics_table(report),
        report=report,
        version=__version__,
        artefact=report.artefact,
        sources=sources,
        parents=list(parents),
        stages=[(p.title, p.report.verb, p.verdict.sentence) for p in parts] if report.verb == "run" else [],
        union=union,
        licence_warnings=licence_warnings(union),
        recipe=_merge_recipe(folder, inputs),
    )
    write_bytes(folder / "README.md", text.encode())


def _merge_recipe(folder: Path, inputs: Sequence[CardInput]) -> str:
    """How a merge is made again, for `honeloom merge --from-card`; empty for anything else."""
    file = folder / "merge.yaml"
    if not file.is_file():
        return ""
    return write_recipe(load_yaml(file), [(i.place, _shown(i), i.fingerprint) for i in inputs])


@dataclass(frozen=True, slots=True)
class _Source:
    """One line of the table of sources."""

    place: str
    what: str
    facts: Facts
    sha256: str


def _sources(inputs: Sequence[CardInput], facts: Mapping[str, Facts]) -> list[_Source]:
    """Every source once, with all the places at which it is read."""
    places: dict[tuple[str, str], list[str]] = {}
    for i in inputs:
        places.setdefault((_shown(i), i.fingerprint), []).append(i.place)
    return [
        _Source(", ".join(dict.fromkeys(read)), what, facts.get(digest, Facts()), digest[:16])
        for (what, digest), read in places.items()
    ]


def _union(sources: Sequence[_Source]) -> dict[str, list[str]]:
    """Licence -> what has it."""
    found: dict[str, list[str]] = {}
    for source in sources:
        for licence in source.facts.licences:
            found.setdefault(licence, []).append(source.what)
    return {licence: found[licence] for licence in sorted(found)}


def _front_matter(
    report: Report,
    inputs: Sequence[CardInput],
    relation: str | None,
    above: Sequence[str],
    union: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Only hub ids are named: a path of this machine means nothing to a reader."""
    front: dict[str, Any] = {"tags": ["honeloom"]}
    own = {i.value.partition("@")[0] for i in inputs if i.kind == "model" and i.revision and i.place != "against"}
    parents = sorted(own | set(above))
    if licence := only_licence(union):
        front["license"] = licence
    datasets = sorted({i.value.partition("@")[0] for i in inputs if i.kind == "rows" and i.revision})
    if report.artefact and report.artefact.kind == "gguf":
        front["tags"].append("gguf")
    elif relation:
        front["library_name"] = "peft" if relation == "adapter" else "transformers"
    if relation and parents:
        front["base_model"] = parents
        front["base_model_relation"] = relation
    if datasets:
        front["datasets"] = datasets
    return front


def _shown(found: CardInput) -> str:
    """A hub id or a lab name as it is; of a path only the end, for the card may be published."""
    return found.value if found.revision or found.value.startswith("lab:") else Path(found.value).name


def cell(value: Any) -> str:
    """Text for Markdown: no markup, no line breaks, no cell ends."""
    text = html.escape(clip(value, 600), quote=False)
    for mark in "\\`*_[]|~$#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
