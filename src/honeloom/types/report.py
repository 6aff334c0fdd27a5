"""What a stage says of its result: metrics, verification, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Artefact", "Check", "Cost", "Metric", "Report"]

SCHEMA = "honeloom.report/1"
ArtefactKind = Literal["model", "adapter", "rows", "scores", "gguf", "run"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number with its direction, unit and uncertainty.

    `stderr` is None where no standard error is defined; `domain` names the subset of rows.
    """

    name: str
    value: float
    n: int
    unit: str
    higher_is_better: bool
    stderr: float | None = None
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A claim, the value measured for it, its limit, and whether it held."""

    claim: str
    value: float | str | bool | None
    limit: float | str | bool | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Artefact:
    """What a stage produced.

    `sha256` is the fingerprint of its content: of one file, or of a model folder's files
    without the side files; an adapter's covers its base model, a run's all its stages.
    """

    kind: ArtefactKind
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall seconds, CPU seconds and peak resident bytes of the process."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """The content of `report.json`; verbs return it.

    `details` holds the keys that the verb's contract names. `out` is None for a verb that
    wrote nothing. `reused` is true where a complete result with the same key was found; it
    is not part of the file.
    """

    verb: str
    status: Literal["ok", "failed"]
    out: str | None
    seed: int
    artefact: Artefact | None
    metrics: tuple[Metric, ...] = ()
    verification: tuple[Check, ...] = ()
    warnings: tuple[str, ...] = ()
    cost: Cost = Cost(0.0, 0.0, 0)
    details: Mapping[str, Any] = field(default_factory=dict)
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of the contract; non-finite numbers become null."""
        document = {"schema": SCHEMA, **asdict(self)}
        del document["reused"]
        return dict(_finite(document))

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, reused: bool = False) -> Report:
        """Rebuild a report from `to_json`'s document."""
        return cls(
            verb=document["verb"],
            status=document["status"],
            out=document["out"],
            seed=document["seed"],
            artefact=Artefact(**document["artefact"]) if document["artefact"] else None,
            metrics=tuple(Metric(**m) for m in document["metrics"]),
            verification=tuple(Check(**c) for c in document["verification"]),
            warnings=tuple(document["warnings"]),
            cost=Cost(**document["cost"]),
            details=document["details"],
            reused=reused,
        )

    def metric(self, name: str, domain: str | None = "all") -> Metric:
        """Return one metric by name and domain; KeyError names what there is."""
        for m in self.metrics:
            if m.name == name and m.domain == domain:
                return m
        raise KeyError(
            f"no metric {name!r} for domain {domain!r}; there are {[(m.name, m.domain) for m in self.metrics]}"
        )

    @property
    def path(self) -> Path:
        """The artefact's path; ValueError where the verb wrote nothing."""
        if self.artefact is None:
            raise ValueError(f"{self.verb} wrote no artefact; pass output_dir to keep its result")
        return Path(self.artefact.path)

    def _repr_html_(self) -> str:
        """Table view for notebooks."""
        from html import escape

        head = f"<b>{escape(self.verb)}</b> {escape(self.status)} {escape(self.out or '')}"
        rows = "".join(
            f"<tr><td>{escape(m.name)}</td><td>{escape(m.domain or '')}</td><td>{m.value:.4g}</td>"
            f"<td>{escape(m.unit)}</td></tr>"
            for m in self.metrics
        )
        return f"{head}<table>{rows}</table>" if rows else head


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, recursively: JSON has no spelling for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
