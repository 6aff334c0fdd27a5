"""What a stage gets and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from honeloom.config.base import VerbConfig
from honeloom.runs.log import Log
from honeloom.stages.inputs import ResolvedInput
from honeloom.types.report import ArtefactKind, Check, Metric

__all__ = ["Outcome", "Work", "resolved_settings"]

ConfigT = TypeVar("ConfigT", bound=VerbConfig)


@dataclass(frozen=True, slots=True)
class Work(Generic[ConfigT]):
    """A stage's view of the run: where to write, what to read, whom to tell.

    `leads` is false in the further processes of a spread job: they compute and write nothing.

    Attributes
    ----------
    config : VerbConfig
        The verb's typed settings.
    folder : Path or None
        Folder to write to; it becomes the output when the stage ends well. May hold files
        of an interrupted attempt with the same key (`resumed`). None: write nothing.
    inputs : mapping
        Resolved inputs by their place in the config ("model", "rows.0", "models.1.model").
    shown : Path or None
        The path that the folder will have once it is published.
    """

    config: ConfigT
    folder: Path | None
    inputs: Mapping[str, ResolvedInput]
    log: Log
    resumed: bool = False
    leads: bool = True
    shown: Path | None = None

    def model(self, place: str = "model") -> Path:
        """Local folder of a model or folder input."""
        return self.inputs[place].paths[0]

    def rows(self, field_name: str = "rows") -> tuple[ResolvedInput, ...]:
        """Every input of a rows field, in order."""
        return tuple(i for p, i in self.inputs.items() if p.startswith(f"{field_name}."))

    @property
    def dir(self) -> Path:
        """The folder of a stage that always writes."""
        assert self.folder is not None  # `run_job` lets only `evaluate` work without one
        return self.folder


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage reports.

    `artefact` is the path below the output that is the result itself; `relation` is how a
    model descends from its parents (adapter, finetune, merge or quantized).
    """

    kind: ArtefactKind
    artefact: str = "."
    metrics: tuple[Metric, ...] = ()
    checks: tuple[Check, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    relation: str | None = None


def resolved_settings(work: Work[Any]) -> dict[str, Any]:
    """Settings with every default, and inputs as the user named them, without what is unset or only about the run."""
    document: dict[str, Any] = work.config.model_dump(mode="json", exclude={"source_format", "max_memory", "threads"})
    for place, found in work.inputs.items():
        node: Any = document
        *path, last = place.split(".")
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[int(last) if isinstance(node, list) else last] = found.value
    trimmed: dict[str, Any] = _without_unset(document)
    return trimmed


def _without_unset(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_unset(v) for k, v in node.items() if v is not None and v != [] and v != {}}
    return [_without_unset(item) for item in node] if isinstance(node, list) else node
