"""What `glue` says at its end: every model on the report rows, what was taken and why, and the advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from honeloom.evaluation.statistics import Comparison, macro_bootstrap
from honeloom.merging.search.objective import Objective
from honeloom.stages.glue_jobs import Jobs
from honeloom.stages.glue_mix import Candidate, Expert, teaching_rows
from honeloom.stages.glue_rows import GlueRows, Scored, score_all
from honeloom.stages.work import Work
from honeloom.stages.zoo_clusters import ZooClusters
from honeloom.stages.zoo_search import Searched
from honeloom.types.report import Metric, Report
from honeloom.zoo.advice import Finding, advise
from honeloom.zoo.choice import best_by_domain, domain_means, fill_unread
from honeloom.zoo.config import GlueConfig

__all__ = ["UNITS", "Glued", "describe", "pick"]

UNITS = {"bits_per_char": "bits/char", "loss": "nats/token", "accuracy": "share wrong"}


@dataclass(frozen=True)
class Glued:
    """All that was made of a zoo.

    Attributes
    ----------
    clusters, rows
        As found and read.
    members : sequence of Expert
        The usable models.
    merged : sequence of Expert
        One result per cluster.
    mixed : sequence of Candidate
        Mixtures, made or not.
    searches : mapping
        Of clusters of several models, by the name of their merge.
    groups : mapping
        Name of a cluster's result -> its models.
    """

    clusters: ZooClusters
    rows: GlueRows
    members: Sequence[Expert]
    merged: Sequence[Expert]
    mixed: Sequence[Candidate]
    searches: Mapping[str, Searched]
    groups: Mapping[str, Sequence[str]]

    def made(self) -> dict[str, tuple[str, Scored]]:
        """Kind and search scores of everything that could be the result, members first."""
        found = {e.name: ("member", e.scored) for e in self.members}
        found |= {e.name: ("merge", e.scored) for e in self.merged if e.name not in found}
        return found | {c.name: ("mixture", c.scored) for c in self.mixed if c.scored is not None}


def pick(work: Work[GlueConfig], glued: Glued) -> Expert | Candidate:
    """What becomes the result: the best by the search rows that no router was made from.

    A merge or mixture takes the place of the best single model, and a mixture that of the best merge, only if it is
    better beyond the noise of these rows.
    """
    config, part = work.config, glued.rows.search
    objective = Objective(part.domains, config.target.weights)
    judging = np.flatnonzero(~np.array(teaching_rows(glued.rows))) if glued.mixed else np.arange(len(part.rows))
    made = glued.made()
    values = fill_unread({name: scored.values for name, (_, scored) in made.items()})
    confidence, margin = getattr(config.search, "confidence", 0.95), getattr(config.search, "margin", 0.0)
    best = None
    for kind in ("member", "merge", "mixture"):
        names = [name for name, (k, _) in made.items() if k == kind]
        if not names:
            continue
        first = min(names, key=lambda n: (objective.estimate(values[n][judging], judging).value, n))
        if best is None:
            best = first
            continue
        gap = objective.difference(values[first][judging], values[best][judging], judging)
        better = gap.is_below(0.0, confidence) and gap.value <= -margin
        work.log.say(
            f"glue: {first} less {best} on {len(judging)} search rows: {gap.value:+.4f} (error {gap.stderr:.4f})"
            f"{'' if better else ', no better beyond noise'}"
        )
        best = first if better else best
    everything: dict[str, Expert | Candidate] = {c.name: c for c in glued.mixed}
    everything |= {e.name: e for e in (*glued.merged, *glued.members)}
    assert best is not None  # a zoo without a usable model was refused
    return everything[best]


def describe(
    work: Work[GlueConfig], jobs: Jobs, glued: Glued, chosen: Expert | Candidate, report: Report
) -> tuple[dict[str, Any], tuple[Metric, ...]]:
    """Measure everything on the report rows; details and metrics of the report."""
    config, part, metric = work.config, glued.rows.report, glued.rows.metric
    models = {e.name: e.model for e in (*glued.members, *glued.merged)}
    models |= {c.name: jobs.place(c.report) for c in glued.mixed if c.report is not None}
    scored = score_all(jobs, part, models, metric, kind="report")
    values = fill_unread({name: s.values for name, s in scored.items()})
    objective = Objective(part.domains, config.target.weights)
    everything = np.arange(len(part.rows))
    means = {name: objective.estimate(v, everything).value for name, v in values.items()}
    kinds = {name: kind for name, (kind, _) in glued.made().items()}
    members = [e.name for e in glued.members]
    best = min(members, key=lambda name: (means[name], name))
    best_in = best_by_domain({n: values[n] for n in members}, part.domains)
    shares = _shares(best_in, config.target.weights)
    gaps = {n: macro_bootstrap(v, values[best], part.domains, shares, seed=config.seed) for n, v in values.items()}
    oracle = sum(share * domain_means(values[best_in[d]], part.domains)[d] for d, share in shares.items())
    result, routes = chosen.name, _routes(scored[chosen.name], part.rows.ids, part.domains)
    gain = 1 - means[result] / means[best] if means[best] else 0.0
    finding = _finding(glued, means, kinds, best, result, gain, gaps[result], routes, best_in, UNITS[metric])
    table = [_line(n, kinds[n], means[n], domain_means(values[n], part.domains), gaps[n], n == best) for n in values]
    details = {
        **glued.clusters.to_json(),
        "metric": metric, "unit": UNITS[metric],
        "best_single": means[best], "best_single_name": best, "result": means[result], "result_name": result,
        "result_kind": kinds[result], "gain_relative": gain, "ci95": [gaps[result].low, gaps[result].high],
        "oracle": {"value": oracle, "closed": _closed(means[best], means[result], oracle)},
        "evaluations": sum(s.found.evaluations for s in glued.searches.values()),
        "rows_evaluated": sum(s.found.rows_evaluated for s in glued.searches.values()),
        "rows": {"search": len(glued.rows.search.rows), "report": len(part.rows)},
        "models": table, "search": {name: s.to_json() for name, s in glued.searches.items()},
        "mixtures": [{"name": c.name, "experts": list(c.experts), "reason": c.reason} for c in glued.mixed],
        "routes": routes, "advice": advise(finding), "made_by": report.verb,
    }  # fmt: skip
    return details, _metrics(metric, values, part.domains, result, best, means, gaps[result])


def _shares(domains: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Share of each domain; those that no model can read are not among them."""
    given = {d: weights.get(d, 0.0) if weights else 1.0 for d in sorted(domains)}
    total = sum(given.values())
    return {d: w / total for d, w in given.items() if w}


def _closed(best: float, result: float, oracle: float) -> float | None:
    """Share of the gap between the best single model and the best model of every domain that is closed."""
    return (best - result) / (best - oracle) if best > oracle else None


def _routes(scored: Scored, ids: Sequence[str], domains: Sequence[str]) -> dict[str, dict[str, int]]:
    """Domain -> expert -> rows; empty where the result routes no samples."""
    found: dict[str, Counter[str]] = {}
    for row_id, domain in zip(ids, domains, strict=True):
        if row_id in scored.routes:
            found.setdefault(domain, Counter())[scored.routes[row_id]] += 1
    return {domain: dict(sorted(counts.items())) for domain, counts in sorted(found.items())}


def _line(
    name: str, kind: str, value: float, domains: Mapping[str, float], gap: Comparison, is_best: bool
) -> dict[str, Any]:
    interval = None if is_best else [gap.difference, gap.low, gap.high]
    return {"name": name, "kind": kind, "value": value, "interval": interval, "domains": dict(domains)}


def _finding(
    glued: Glued, means: Mapping[str, float], kinds: Mapping[str, str], best: str, result: str, gain: float,
    gap: Comparison, routes: Mapping[str, Mapping[str, int]], best_in: Mapping[str, str], unit: str,
) -> Finding:  # fmt: skip
    use: Counter[str] = Counter()
    for counts in routes.values():
        use.update(counts)
    total = sum(use.values())
    tried = {c.name: c.reason or _why_not(c.name, result, means) for c in glued.mixed}
    return Finding(
        unit, [e.name for e in glued.members], means, {name: s.shares() for name, s in glued.searches.items()},
        glued.clusters.alone, glued.clusters.refused, best, result, gain, (gap.low, gap.high),
        {name: count / total for name, count in use.items()}, best_in, tried,
    )  # fmt: skip


def _why_not(name: str, result: str, means: Mapping[str, float]) -> str:
    return f"{means[name]:.4f}, and {result} was better, or as good and simpler, on the search rows"


def _metrics(
    metric: str, values: Mapping[str, Any], domains: Sequence[str], result: str, best: str, means: Mapping[str, float],
    gap: Comparison,
) -> tuple[Metric, ...]:  # fmt: skip
    """The result by domain, and beside it the best single model and the difference."""
    unit, labels = UNITS[metric], Counter(domains)
    name = "error" if metric == "accuracy" else metric
    found = [
        Metric(name, value, labels[d], unit, False, None, d or "all")
        for d, value in domain_means(values[result], domains).items() if not np.isnan(value)
    ]  # fmt: skip
    rows = len(domains)
    found.append(Metric(name, means[result], rows, unit, False, None, "macro"))
    found.append(Metric("best_single", means[best], rows, unit, False, None, "macro"))
    found.append(Metric("difference", gap.difference, rows, unit, False, (gap.high - gap.low) / 3.92, "macro"))
    return tuple(found)
