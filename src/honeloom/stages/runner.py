"""Run one stage: plan it, find its result, or do the work and prove it.

Every verb passes through here, alone or in a recipe. This module is light; a verb's runner
(and with it torch) is imported only when there is work to do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from honeloom.checkpoint.folders import read_config
from honeloom.config.base import DEFAULT_MAX_TOKENS, NoResultMark, VerbConfig, collect_inputs
from honeloom.config.load import dump_yaml
from honeloom.errors import CheckpointError, ConfigError, SourceError, VerificationError
from honeloom.planning.disk import SMALL_FILES, tuning_bytes
from honeloom.planning.memory import read_decoder
from honeloom.registry import family, load_target
from honeloom.runs.atomic import require_space, write_bytes, write_json
from honeloom.runs.environment import describe_environment
from honeloom.runs.journal import Journal
from honeloom.runs.keys import stage_key
from honeloom.runs.log import Console, Log, QuietConsole
from honeloom.runs.manifest import find_damage
from honeloom.runs.output import Mode, Output, is_complete, open_output, work_folder
from honeloom.runs.processes import rank, world_size
from honeloom.runs.redact import redact, redact_tree
from honeloom.runs.signals import terminate_cleanly
from honeloom.stages.inputs import INPUTS_SCHEMA, ResolvedInput, Resolver, artefact_fingerprint
from honeloom.stages.withdrawn import resolve_inputs
from honeloom.stages.work import Outcome, Work
from honeloom.system import peak_rss
from honeloom.types.plans import StagePlan
from honeloom.types.report import Artefact, Cost, Report
from honeloom.verbs import VERBS, Verb

__all__ = [
    "SIDE_FILES", "Job", "announce", "load_report", "prepare", "require_content", "run_job", "space_needed",
    "write_provenance", "write_side_files",
]  # fmt: skip

SIDE_FILES = (
    "report.json",
    "recipe.lock.yaml",
    "inputs.json",
    "environment.json",
    "events.jsonl",
    "README.md",
    "report.html",
    "manifest.json",
)
"""What stands beside every artefact."""


@dataclass(frozen=True, slots=True)
class Job:
    """A stage that is ready to run: settings, inputs found, key computed."""

    verb: Verb
    config: VerbConfig
    inputs: Mapping[str, ResolvedInput]
    key: str

    def plan(self, name: str, state: str) -> StagePlan:
        """Describe the job for `--dry-run`."""
        return StagePlan(
            stage=name,
            verb=self.verb.name,
            key=self.key,
            state=state,
            inputs={p: i.value for p, i in self.inputs.items()},
            downloads=tuple(i.value for i in self.inputs.values() if i.missing),
            bytes_in=sum(i.size for i in self.inputs.values()),
            config=self.config.model_dump(mode="json"),
        )


def prepare(verb_name: str, config: VerbConfig, resolver: Resolver, *, runs: bool = False) -> Job:
    """Resolve a stage's inputs and compute its key.

    Parameters
    ----------
    verb_name : str
        A name in `VERBS`.
    config : VerbConfig
        Its settings.
    resolver : Resolver
        Finds the inputs.
    runs : bool
        Whether the stage will run, so that its code can be loaded while models are read.
    """
    verb = VERBS[verb_name]
    fields = list(collect_inputs(config))
    resolver.read_ahead(fields, partial(load_target, verb.execute) if runs else lambda: None)
    inputs = resolve_inputs(config, resolver, {f.place: resolver.resolve(f) for f in fields})
    neutral = config.model_dump(mode="json")
    for name, info in type(config).model_fields.items():
        if any(isinstance(m, NoResultMark) for m in info.metadata):
            del neutral[name]
    for place in inputs:
        _blank(neutral, place.split("."))
    settings = {"method_versions": _method_versions(verb, config), **neutral}
    if world_size() > 1:  # every process adds its batch to a step
        settings["processes"] = world_size()
    key = stage_key(verb.name, verb.version, settings, [i.fingerprint for i in inputs.values()])
    return Job(verb, config, inputs, key)


def require_content(job: Job, wanted: Mapping[str, str]) -> None:
    """Refuse inputs whose content is not what a record says.

    Parameters
    ----------
    job : Job
        From `prepare`.
    wanted : mapping
        Place of an input -> its fingerprint.

    Raises
    ------
    SourceError
        An input differs; the message names it and the flag that gives another.
    """
    for place, digest in wanted.items():
        found = job.inputs.get(place)
        if found is None or found.fingerprint != digest:
            value, has = (found.value, found.fingerprint) if found else (None, None)
            raise SourceError(
                f"{place} {value!r} has the content {has}, and the record says {digest}; give the right one with "
                f"--set {place}=PATH"
            )


def _method_versions(verb: Verb, config: VerbConfig) -> list[int]:
    if not verb.family:
        return []
    chosen = getattr(config, "method", None) or getattr(config, "metric", None) or getattr(config, "router", None)
    own = [family(verb.family).get(chosen.type).version] if chosen is not None else []
    if (search := getattr(config, "search", None)) is not None:  # glue has a search and routers beside its merge
        own.append(family("search").get(search.type).version)
    return own + [family("routing").get(m.router.type).version for m in getattr(config, "mixtures", ())]


def _blank(node: Any, parts: list[str]) -> None:
    """Replace an input's path in the dumped config: content decides, not the place."""
    for part in parts[:-1]:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(parts[-1]) if isinstance(node, list) else parts[-1]] = "<input>"


def run_job(
    job: Job,
    out: Path | None,
    *,
    mode: Mode = "new",
    shown: Path | None = None,
    reads: Sequence[Path] = (),
    console: Console | None = None,
) -> Report:
    """Do a job, or return its finished result.

    Parameters
    ----------
    job : Job
        From `prepare`.
    out : Path or None
        Output folder; None only for verbs that can work without one.
    mode : {"new", "resume", "overwrite"}
        What may be replaced, as in `open_output`; overwrite also repeats finished work.
    shown : Path, optional
        The path that `out` will have once the run it belongs to is published.
    reads : sequence of Path
        What the command reads beside the job's inputs, such as its YAML file; it is never replaced.
    console : Console, optional
        Where messages go; silent by default.

    Raises
    ------
    VerificationError
        The result is not what it claims; nothing is published.
    """
    console = console or QuietConsole()
    if world_size() > 1 and (rank() > 0 or job.verb.name != "tune"):
        return _follow(job, out, mode)
    with terminate_cleanly():
        if out is None:
            return _execute(job, None, Log(console), shown=None, resumed=False)[0]
        kept = [*reads, *(p for i in job.inputs.values() for p in i.paths)]
        with open_output(out, job.key, job.verb.name, mode=mode, reuse=mode != "overwrite", inputs=kept) as output:
            if output.reused:
                console.say(f"{job.verb.name}: reused {output.final}")
                return load_report(output.final, reused=True)
            announce(output, console)
            if not output.complete:
                _work_in(job, output, shown or output.final, console)
        if world_size() > 1:
            load_target("honeloom.backends.devices:wait_for_all")()
        return load_report(output.final)


def announce(output: Output, console: Console) -> None:
    """Say what was found at the output: a damaged result, or interrupted attempts with other settings."""
    if output.damage is not None:
        problem = f"{output.damage.file} is damaged ({output.damage.problem})"
        console.warn(f"{output.verb}: {output.final}: {problem}; the result is made again")
    for kept in output.kept:
        console.say(
            f"{output.verb}: an interrupted attempt with other settings is kept at {kept} until a result is complete "
            f"here; --overwrite removes it at once"
        )


def _follow(job: Job, out: Path | None, mode: Mode) -> Report:
    """Compute beside the leading process; write nothing, and return once it has published."""
    if out is None or job.verb.name != "tune":
        raise ConfigError(
            f"{job.verb.name} works in one process, and WORLD_SIZE is {world_size()}; only tune spreads over several: "
            "start this one without torchrun or accelerate launch"
        )
    final = Path(os.path.realpath(out))
    if mode == "overwrite" or not is_complete(final, job.key) or find_damage(final) is not None:
        work = work_folder(final, job.key)
        load_target(job.verb.execute)(Work(job.config, work, job.inputs, Log(QuietConsole()), leads=False))
        load_target("honeloom.backends.devices:wait_for_all")()
    return load_report(final)


def space_needed(job: Job) -> int:
    """Bytes that a stage will write, at most; 0 for verbs that measure it themselves once they know more.

    A tuning writes its result and keeps checkpoints, each with the trained weights and the
    moments of its optimizer. Everything else grows with the rows.
    """
    if job.verb.name in ("merge", "mix", "glue", "drop", "aggregate", "export"):
        return 0
    rows = sum(i.size for i in job.inputs.values() if i.kind == "rows")
    if job.verb.name != "tune":
        return rows + SMALL_FILES
    config: Any = job.config
    full, model = config.method.type == "full", job.inputs["model"]
    try:
        decoder = read_decoder(read_config(model.base or model.paths[0]))
    except CheckpointError:  # a family without known sizes
        return (1 + 2 * 3) * model.size if full else rows + SMALL_FILES
    kinds = {"adamw": 2, "sgd": int(getattr(config.optimizer, "momentum", 0) > 0), "mezo": 0}
    states = kinds[config.optimizer.type]
    width = 0 if full else config.method.rank
    return tuning_bytes(decoder, full=full, rank=width, states=states, dtype=config.dtype, rows=rows)


def _require_space(job: Job, work: Path) -> None:
    """Count what an interrupted attempt has already written as room."""
    written = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
    require_space(work, max(0, space_needed(job) - written))


def _work_in(job: Job, output: Output, shown: Path, console: Console) -> None:
    _require_space(job, output.work)
    (output.work / "events.jsonl").unlink(missing_ok=True)
    with Journal(output.work / "events.jsonl", durable=False) as events:
        log = Log(console, events)
        log.event("start", verb=job.verb.name, key=job.key, resumed=output.resumed)
        if output.resumed:
            log.say(f"{job.verb.name}: resuming the interrupted work in {output.work}")
        report, outcome = _execute(job, output.work, log, shown=shown, resumed=output.resumed)
        log.event("end", status=report.status)
    write_side_files(output.work, job, report, outcome.relation)
    if report.status == "failed":
        failed = [c for c in report.verification if not c.passed]
        raise VerificationError(
            f"{job.verb.name}: {failed[0].claim}: measured {failed[0].value}, limit {failed[0].limit}; "
            f"nothing was published, the evidence is in {output.work}"
        )
    output.finish()


def _execute(job: Job, folder: Path | None, log: Log, *, shown: Path | None, resumed: bool) -> tuple[Report, Outcome]:
    started, cpu = time.monotonic(), time.process_time()
    execute = load_target(job.verb.execute)
    guard = load_target("honeloom.backends.devices:memory_guard")
    with guard(job.config.device, job.verb.name, memory_advice(job.config)):
        outcome: Outcome = execute(Work(job.config, folder, job.inputs, log, resumed, shown=shown))
    artefact = None
    if folder and shown:
        path = shown if outcome.artefact == "." else shown / outcome.artefact
        base = job.inputs["model"].fingerprint if outcome.kind == "adapter" and "model" in job.inputs else None
        artefact = Artefact(outcome.kind, str(path), artefact_fingerprint(folder / outcome.artefact, base=base))
    report = Report(
        verb=job.verb.name,
        status="ok" if all(check.passed for check in outcome.checks) else "failed",
        out=str(shown) if shown else None,
        seed=job.config.seed,
        artefact=artefact,
        metrics=outcome.metrics,
        verification=outcome.checks,
        warnings=tuple(log.warnings),
        cost=Cost(round(time.monotonic() - started, 3), round(time.process_time() - cpu, 3), peak_rss()),
        details=outcome.details,
    )
    return report, outcome


def memory_advice(config: VerbConfig) -> list[str]:
    """Flags of a verb that lower its memory, as far as it has them."""
    advice = []
    if (size := getattr(config, "batch_size", 1)) > 1:
        advice.append(f"--batch-size {size // 2}")
    if hasattr(config, "max_length"):
        advice.append(f"--max-length {(config.max_length or DEFAULT_MAX_TOKENS) // 2}")
    if hasattr(config, "load_in") and config.load_in is None:
        advice.append("--load-in 4bit")
    return [*advice, "--dtype bf16"]


def load_report(folder: Path, *, reused: bool = False) -> Report:
    """Read a finished folder's `report.json`."""
    return Report.from_json(json.loads((folder / "report.json").read_bytes()), reused=reused)


def write_side_files(folder: Path, job: Job, report: Report, relation: str | None) -> None:
    """Write everything that stands beside the artefact, except the manifest; secrets are blanked."""
    report = Report.from_json(redact_tree(report.to_json()))
    lock = {"version": 1, "stages": {job.verb.name: {job.verb.name: job.config.model_dump(mode="json")}}}
    write_bytes(folder / "recipe.lock.yaml", redact(dump_yaml(lock)).encode())
    write_json(folder / "inputs.json", redact_tree(describe_inputs(job)))
    write_json(folder / "environment.json", describe_environment())
    write_json(folder / "report.json", report.to_json())
    write_provenance(folder, report, list(job.inputs.values()), relation)
    load_target("honeloom.reporting.page:write_page")(folder, report)


def write_provenance(folder: Path, report: Report, inputs: Sequence[ResolvedInput], relation: str | None) -> None:
    """Write the card: what the result was made from, its licences and parents."""
    facts = load_target("honeloom.stages.provenance:facts_of")(inputs)
    parents = load_target("honeloom.stages.provenance:hub_parents")(inputs) if relation else []
    write = load_target("honeloom.reporting.card:write_card")
    write(folder, report, inputs, relation, facts=facts, parents=parents)


def describe_inputs(job: Job) -> dict[str, Any]:
    """Content of a stage's `inputs.json`: what was read, by content hash; the links of the lineage chain.

    `paths` are the absolute folders or files; they are empty for an artefact of the same run,
    which `relative` names as seen from this stage. `withdrawn` stands there where ids of the rows were not read;
    the fingerprint tells that too. `licences` are those that its card tells, or those of what it was made from.
    A run folder's own file has, instead of
    `inputs`, `stages`: stage name -> such a list.
    """
    return {
        "schema": INPUTS_SCHEMA,
        "key": job.key,
        "inputs": [_describe_input(i) for i in job.inputs.values()],
    }


def _describe_input(found: ResolvedInput) -> dict[str, Any]:
    known = not found.fingerprint.startswith("stage:")
    return {
        "place": found.place,
        "kind": found.kind,
        "value": found.value,
        "paths": [] if found.relative else [str(p) for p in found.paths],
        "relative": found.relative,
        "revision": found.revision,
        "sha256": found.fingerprint,
        "bytes": found.size,
        **({"licences": list(load_target("honeloom.stages.provenance:licences_of")(found))} if known else {}),
        **({"withdrawn": list(found.withdrawn)} if found.withdrawn else {}),
    }
