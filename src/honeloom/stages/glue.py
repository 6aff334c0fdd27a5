"""`glue`: from a zoo of models to one: clusters, searched merges, mixtures, and the measured advice."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from honeloom.checkpoint.folders import tokenizer_files
from honeloom.config.load import dump_yaml
from honeloom.errors import IncompatibleModelsError
from honeloom.merging.engine.sources import ModelSource
from honeloom.runs.atomic import write_bytes
from honeloom.runs.redact import redact
from honeloom.stages.glue_jobs import Jobs
from honeloom.stages.glue_mix import Candidate, Expert, mix_all
from honeloom.stages.glue_report import UNITS, Glued, describe, pick
from honeloom.stages.glue_rows import GlueRows, read_glue_rows, score_all
from honeloom.stages.inputs import artefact_fingerprint, model_files
from honeloom.stages.work import Outcome, Work
from honeloom.stages.zoo_clusters import ZooClusters, cluster_zoo, open_zoo
from honeloom.stages.zoo_search import Searched, search_cluster
from honeloom.system import copy_file, cores
from honeloom.types.report import Check, Report
from honeloom.zoo.config import GlueConfig

__all__ = ["execute"]

MEMBERS = "members"


def execute(work: Work[GlueConfig]) -> Outcome:
    """Run `glue`."""
    config = work.config
    with ExitStack() as stack:
        sources, base, clusters = _cluster(work, stack)
        clusters.write(work.dir)
        if config.only == "clusters":
            return Outcome("scores", checks=_cluster_checks(clusters), details=clusters.to_json())
        rows, jobs = read_glue_rows(work), Jobs(work)
        singles = score_all(jobs, rows.search, _values(work, sources), rows.metric, kind="search")
        searches = _search(work, clusters, sources, base, rows, singles)
    if config.only == "search":
        return _search_outcome(work, jobs, clusters, searches, rows)
    merged = _merge(work, jobs, clusters, searches, rows, singles)
    members = [Expert(name, value, singles[name]) for name, value in _values(work, sources).items()]
    groups: dict[str, tuple[str, ...]] = {e.name: (e.name,) for e in merged}
    groups |= {e.name: s.models for e, s in zip(merged, searches.values(), strict=False)}  # those of several come first
    mixed = mix_all(jobs, rows, members, merged, groups) if config.only is None else []
    glued = Glued(clusters, rows, members, merged, mixed, searches, groups)
    chosen = pick(work, glued)
    report = _final(work, jobs, glued, chosen)
    details, metrics = describe(work, jobs, glued, chosen, report)
    checks = (*_cluster_checks(clusters), *_root_checks(work, report), *_kept_checks(jobs))
    jobs.clear()
    return Outcome("model", metrics=metrics, checks=checks, details=details, relation="merge")


def _values(work: Work[GlueConfig], sources: Mapping[str, ModelSource]) -> dict[str, str]:
    """What the user called each usable model."""
    return {name: work.inputs[place].value for name, place in work.config.named() if name in sources}


def _cluster(
    work: Work[GlueConfig], stack: ExitStack
) -> tuple[dict[str, ModelSource], ModelSource | None, ZooClusters]:
    config = work.config
    places = {name: work.inputs[place] for name, place in config.named()}
    sources, refused = open_zoo({name: (f.paths[0], f.base) for name, f in places.items()}, stack)
    base = None
    if "base" in work.inputs:
        found = work.inputs["base"]
        base = stack.enter_context(ModelSource(found.value, found.paths[0], found.base))
    refused = (*refused, *((left.model, left.reason) for left in config.left_out))
    if not sources:
        raise IncompatibleModelsError(f"no model of the zoo can be used; first {refused[0][0]}: {refused[0][1]}")
    clusters = cluster_zoo(
        sources, base, method=config.cluster.type, threshold=config.cluster.threshold, measure=config.cluster.measure,
        threads=config.threads or cores(), log=work.log, refused=refused,
    )  # fmt: skip
    kept = {name: source for name, source in sources.items() if any(name in c for c in clusters.clusters)}
    for cluster in clusters.clusters:
        work.log.say(f"glue: cluster of {len(cluster)}: {', '.join(cluster)}")
    for model, reason in clusters.refused:
        work.log.warn(f"{model} is left out: {reason}")
    return kept, base, clusters


def _search(
    work: Work[GlueConfig],
    clusters: ZooClusters,
    sources: Mapping[str, ModelSource],
    base: ModelSource | None,
    rows: GlueRows,
    singles: Mapping[str, Any],
) -> dict[str, Searched]:
    """Search every cluster of several models; by the name of its merge."""
    found = {}
    for number, cluster in enumerate((c for c in clusters.clusters if len(c) > 1), 1):
        name = f"cluster-{number}"
        found[name] = search_cluster(
            work,
            name,
            {model: sources[model] for model in cluster},
            base,
            rows,
            {m: singles[m] for m in cluster},
            clusters,
        )
    return found


def _merge(
    work: Work[GlueConfig],
    jobs: Jobs,
    clusters: ZooClusters,
    searches: Mapping[str, Searched],
    rows: GlueRows,
    singles: Mapping[str, Any],
) -> list[Expert]:
    """One result per cluster, the largest first: a merge, or the best or only model as it is."""
    found, values = [], {name: work.inputs[place].value for name, place in work.config.named()}
    for name, searched in searches.items():
        if searched.single is not None:
            found.append(Expert(searched.single, values[searched.single], singles[searched.single]))
            continue
        report = jobs.run("merge", work.dir / MEMBERS / name, f"merge of {name}", **searched.document)
        model = jobs.place(report)
        scored = score_all(jobs, rows.search, {name: model}, rows.metric, kind="search")[name]
        found.append(Expert(name, model, scored))
        work.log.say(f"glue: {name} merged from {', '.join(searched.taken)}")
    return [*found, *(Expert(c[0], values[c[0]], singles[c[0]]) for c in clusters.clusters if len(c) == 1)]


def _search_outcome(
    work: Work[GlueConfig], jobs: Jobs, clusters: ZooClusters, searches: Mapping[str, Searched], rows: GlueRows
) -> Outcome:
    for name, searched in searches.items():
        text = redact(dump_yaml(searched.document))
        write_bytes(work.dir / f"{name}.yaml", text.encode())
    details = {
        **clusters.to_json(), "metric": rows.metric, "unit": UNITS[rows.metric],
        "search": {name: s.to_json() for name, s in searches.items()},
    }  # fmt: skip
    jobs.clear()
    return Outcome("scores", checks=_cluster_checks(clusters), details=details)


def _final(work: Work[GlueConfig], jobs: Jobs, glued: Glued, chosen: Expert | Candidate) -> Report:
    """Lay the chosen model at the root; the report of the verb that made it."""
    if isinstance(chosen, Candidate):
        report = chosen.made()
    elif chosen.name in glued.searches:
        report = jobs.adopt(work.dir / MEMBERS / chosen.name)
    else:  # a model as it came, perhaps an adapter: written as a merge of one
        report = jobs.run(
            "merge",
            jobs.scratch / "single",
            f"copy of {chosen.name}",
            models=[chosen.model],
            method={"type": "linear"},
            threads=work.config.threads,
        )
    folder = jobs.folder_of(report)
    for name in [*model_files(folder), *tokenizer_files(folder)]:
        target = work.dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, target)
    return report


def _root_checks(work: Work[GlueConfig], report: Report) -> tuple[Check, ...]:
    """That what lies at the root is what was verified."""
    assert report.artefact is not None  # merge and mix write
    found = artefact_fingerprint(work.dir)
    same = found == report.artefact.sha256
    claims = tuple(Check(f"{report.verb}: {c.claim}", c.value, c.limit, c.passed) for c in report.verification)
    return (
        *claims,
        Check("the model at the root is the one that was measured (sha256)", found, report.artefact.sha256, same),
    )


def _kept_checks(jobs: Jobs) -> tuple[Check, ...]:
    """That every merge of a cluster passed its own checks."""
    reports = [jobs.adopt(p) for p in sorted((jobs.work.dir / MEMBERS).glob("*/")) if (p / "report.json").is_file()]
    failed = [r.out for r in reports for c in r.verification if not c.passed]
    return (Check(f"checks that failed in {len(reports)} merged members", float(len(failed)), 0.0, not failed),)


def _cluster_checks(clusters: ZooClusters) -> tuple[Check, ...]:
    """That every usable model is in one cluster, and in one alone."""
    members = [model for cluster in clusters.clusters for model in cluster]
    doubled = len(members) - len(set(members))
    return (Check("models in more than one cluster", float(doubled), 0.0, doubled == 0),)
