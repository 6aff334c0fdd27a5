"""What a stage says of its result: metrics, verification, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from honeloom.types.views import html_table, plain, short, text_table

__all__ = ["Artefact", "Check", "Cost", "Metric", "Report"]

SCHEMA = "honeloom.report/1"
_DOMAINS_SHOWN = 40
_MAIN = ("loss", "accuracy", "train_loss_last")
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


@dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        """One line: status, main number, claims, place."""
        parts = [f"{self.verb} {self.status}"]
        overall = {m.name: m for m in self._main_metrics() if m.domain in (None, "all")}
        main = next((overall[n] for n in (*_MAIN, *reversed(overall)) if n in overall), None)
        if main is not None:
            parts.append(plain(f"{main.name} {short(main.value)} {main.unit}"))
        parts.append(self._claims())
        if self.warnings:
            parts.append(f"{len(self.warnings)} warning{'s' * (len(self.warnings) > 1)}")
        return f"<Report {', '.join(parts)}{f', {self._place()}' if self.out else ''}>"

    def __str__(self) -> str:
        """Warnings, metrics and verification as text."""
        lines = [f"{self.verb} {self.status}{f': {self._place()}' if self.out else ''}"]
        lines += [f"warning: {plain(w)}" for w in self.warnings]
        lines += [plain(s) for s in self._sentences()]
        if self._main_metrics():
            lines.append(text_table(*_metric_table(self._main_metrics())))
        return "\n".join([*lines, *(_failure(c) for c in self.verification if not c.passed), self._claims()])

    def _repr_html_(self) -> str:
        """Table view for notebooks: warnings first, then numbers and claims; every text escaped."""
        mark = "reused" if self.reused else self.status
        parts = [f"<p><b>{escape(self.verb)}</b> {escape(mark)}{escape(f' · {self._place()}' if self.out else '')}</p>"]
        if self.warnings:
            parts.append("<ul>" + "".join(f"<li>Warning: {escape(w[:600])}</li>" for w in self.warnings) + "</ul>")
        parts += [f"<p>{escape(s)}</p>" for s in self._sentences()]
        if self._main_metrics():
            parts.append(html_table(*_metric_table(self._main_metrics())))
        if self.verification:
            rows = [(c.claim, c.value, c.limit, "yes" if c.passed else "NO") for c in self.verification]
            parts.append(html_table(("verified claim", "measured", "limit", "held"), rows))
        return "".join(parts)

    def _place(self) -> str:
        """The output as seen from the working directory, where it lies below."""
        out, here = Path(self.out or ""), Path.cwd()
        return str(out.relative_to(here) if out.is_relative_to(here) else out)

    def _sentences(self) -> list[str]:
        """What was compared, in words; and how many domains the table leaves out."""
        against = self.details.get("against")
        compared = [against["sentence"]] if against else list(self.details.get("comparisons", ()))
        domains = len({m.domain for m in self._main_metrics()})
        left_out = f"{_DOMAINS_SHOWN} of {domains} domains:" if domains > _DOMAINS_SHOWN else ""
        return [*compared, *([left_out] if left_out else [])]

    def _main_metrics(self) -> list[Metric]:
        """All metrics; of a run, the main one of every evaluation."""
        if self.verb != "run":
            return list(self.metrics)
        stages = {s["name"] for s in self.details.get("stages", ()) if s["verb"] == "evaluate"}
        measured = [m for m in self.metrics if m.name.partition("/")[0] in stages]
        kinds = [m.name.partition("/")[2] for m in measured]
        return [m for m, kind in zip(measured, kinds, strict=True) if kind == kinds[0]]

    def _claims(self) -> str:
        held = sum(c.passed for c in self.verification)
        return f"{held} of {len(self.verification)} claims hold" if self.verification else "nothing was verified"


def _metric_table(metrics: Sequence[Metric]) -> tuple[list[str], list[list[object]]]:
    """One row per domain, totals first; per metric its value and, where there is any, its standard error."""
    names = list(dict.fromkeys(m.name for m in metrics))
    cells = {(m.name, m.domain): m for m in reversed(metrics)}
    totals = [d for d in (None, "all", "macro") if any((n, d) in cells for n in names)]
    domains = [*totals, *dict.fromkeys(m.domain for m in metrics if m.domain not in totals)]
    columns, parts = ["domain"], []
    for name in names:
        mine = [m for m in metrics if m.name == name]
        fields = ("value", "stderr") if any(m.stderr is not None for m in mine) else ("value",)
        columns += [f"{name} ({mine[0].unit})", "±"][: len(fields)]
        parts += [(name, f) for f in fields]
    rows: list[list[object]] = []
    for domain in domains[:_DOMAINS_SHOWN]:
        values = [getattr(cells.get((name, domain)), field, None) for name, field in parts]
        counts = [cells[name, domain].n for name in names if (name, domain) in cells]
        rows.append([domain or "all", *values, counts[0]])
    return [*columns, "n"], rows


def _failure(check: Check) -> str:
    return plain(f"FAIL {check.claim}: {short(check.value)} (limit {short(check.limit)})")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, recursively: JSON has no spelling for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
