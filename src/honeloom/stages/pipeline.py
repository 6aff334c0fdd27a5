"""Run a recipe: stages in order inside one run folder, finished ones reused, interrupted ones resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from honeloom.config.load import dump_yaml
from honeloom.config.recipe import Recipe, Step, resolve_steps
from honeloom.registry import load_target
from honeloom.runs.atomic import commit_point, rename, write_bytes, write_json
from honeloom.runs.environment import describe_environment
from honeloom.runs.journal import Journal
from honeloom.runs.keys import combine_digests, stage_key
from honeloom.runs.log import Console, Log, QuietConsole
from honeloom.runs.manifest import find_damage, load_manifest
from honeloom.runs.output import Mode, Output, is_complete, locate, open_output
from honeloom.runs.redact import redact, redact_tree
from honeloom.runs.signals import terminate_cleanly
from honeloom.stages.costs import Entry, with_costs
from honeloom.stages.inputs import INPUTS_SCHEMA, Placed, Resolver
from honeloom.stages.needs import plan_job
from honeloom.stages.references import check_extras, check_references
from honeloom.stages.runner import Job, announce, describe_inputs, load_report, prepare, run_job, write_provenance
from honeloom.stages.sweep import ABLATION_FILE, SWEEP_FILE, compare_points, effects
from honeloom.system import copy_file
from honeloom.types.plans import StagePlan
from honeloom.types.report import Artefact, Cost, Report

__all__ = ["plan_recipe", "run_recipe"]


def run_recipe(
    recipe: Recipe, out: Path, *, mode: Mode = "new", reads: Sequence[Path] = (), console: Console | None = None
) -> Report:
    """Run every stage of a recipe.

    A stage whose key is already complete in `out` (or in the interrupted attempt beside it,
    whatever recipe that one followed) is reused. A changed recipe needs mode resume or
    overwrite; both keep the matching stages, and the old run stays until the new is complete.

    Parameters
    ----------
    recipe : Recipe
        From `load_recipe`.
    out : Path
        The run folder.
    mode : {"new", "resume", "overwrite"}
        What `out` may hold: nothing, an earlier honeloom result, or anything.
    reads : sequence of Path
        What the command reads beside the stages' inputs, such as the recipe's file; it is never replaced.

    Raises
    ------
    MissingExtraError
        A stage needs a package that is not installed; nothing has run.
    OutputExistsError
        `out` holds something that `mode` does not allow.
    VerificationError
        A stage's result is not what it claims.
    """
    console = console or QuietConsole()
    out = locate(out)
    steps = resolve_steps(recipe, out)
    check_references(steps)
    check_extras(steps)
    resolver = Resolver(pending={str(s.folder): s.name for s in steps})
    jobs = [prepare(s.verb, s.config, resolver) for s in steps]
    asked = {"sweep": recipe.sweep, "objectives": [o.name for o in recipe.objectives]} if recipe.sweep else {}
    key = stage_key("run", 1, {"stages": [s.name for s in steps], **asked}, [j.key for j in jobs])
    with terminate_cleanly(), open_output(out, key, "run", mode=mode, inputs=[*reads, *_read(jobs)]) as output:
        if output.reused:
            report = load_report(out, reused=True)
            for stage in report.details["stages"]:
                console.say(f"{stage['name']}: reused")
            return report
        announce(output, console)
        if not output.complete:
            _run_in(recipe, steps, jobs, output, resolver, console)
    return load_report(out)


def plan_recipe(
    recipe: Recipe, out: Path, *, calibrate: bool = False, console: Console | None = None
) -> list[StagePlan]:
    """Say what `run_recipe` would do and cost; loads no weights of the recipe's models and writes nothing."""
    out = locate(out)
    steps = resolve_steps(recipe, out)
    check_references(steps)
    resolver = Resolver(fetch=False, pending={str(s.folder): s.name for s in steps})
    entries = []
    for step in steps:
        job = prepare(step.verb, step.config, resolver)
        state = "run"
        if is_complete(step.folder, job.key):
            state = "reuse"
            _place(resolver, step, step.folder, load_report(step.folder))
        planned = replace(plan_job(job, step.name, state), **_place_in_sweep(recipe, step))
        entries.append(Entry(job, planned, str(step.folder)))
    return with_costs(entries, calibrate=calibrate, console=console)


def _place_in_sweep(recipe: Recipe, step: Step) -> dict[str, Any]:
    """Numbers of the points that a stage belongs to, and what reaches it; nothing without a sweep or ablation."""
    if not (recipe.sweep or recipe.ablation):
        return {}
    points = tuple(p.number for p in recipe.points() if p.stages[step.stage] == step.name)
    return {"points": points, "values": dict(step.values)}


def _run_in(
    recipe: Recipe, steps: Sequence[Step], outside: Sequence[Job], output: Output, resolver: Resolver, console: Console
) -> None:
    (output.work / "stages").mkdir(exist_ok=True)
    reports: dict[str, Report] = {}
    first: dict[tuple[str, str], Step] = {}
    shared: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        job = prepare(step.verb, step.config, resolver)
        folder = output.work / "stages" / step.folder.name
        same = first.setdefault((step.stage, job.key), step)
        if same is not step:  # points of a sweep whose settings and inputs came out the same
            console.say(f"[{number}/{len(steps)}] {step.name}: the same as {same.name}")
            shared[step.name] = same.name
            _place(resolver, step, folder.with_name(same.folder.name), reports[same.name], shown=str(same.folder))
            continue
        _adopt(output.final / "stages" / step.folder.name, folder, job.key)
        mode: Mode = "resume" if not folder.exists() or load_manifest(folder) else "overwrite"
        if is_complete(folder, job.key) and (damage := find_damage(folder)):
            console.warn(f"{step.name}: {damage.file} is damaged ({damage.problem}); the stage is done again")
            mode = "overwrite"
        if mode == "resume" and is_complete(folder, job.key):
            console.say(f"[{number}/{len(steps)}] {step.name}: reused")
            report = load_report(folder)
        else:
            console.say(f"[{number}/{len(steps)}] {step.name}: {step.verb}")
            report = run_job(job, folder, mode=mode, shown=step.folder, console=console)
        _place(resolver, step, folder, report)
        reports[step.name] = report
        output.valuable = True
    made = [s for s in steps if s.name not in shared]
    _clear(output.work / "stages", {s.folder.name for s in made})
    jobs = {s.name: job for s, job in zip(steps, outside, strict=True)}
    _write_run(Done(recipe, made, jobs, reports, shared), output, console)
    output.finish()


@dataclass(frozen=True)
class Done:
    """A run whose stages are made: these in order; jobs and reports by their names; and who shares whose result."""

    recipe: Recipe
    steps: Sequence[Step]
    jobs: Mapping[str, Job]
    reports: Mapping[str, Report]
    shared: Mapping[str, str]


def _clear(folder: Path, stages: set[str]) -> None:
    """Remove what a killed attempt left between the stages: locks, half-adopted and half-written folders."""
    for path in folder.iterdir():
        if path.name in stages:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _read(jobs: Sequence[Job]) -> list[Path]:
    return [p for job in jobs for i in job.inputs.values() for p in i.paths]


def _place(resolver: Resolver, step: Step, folder: Path, report: Report, *, shown: str = "") -> None:
    assert report.artefact is not None  # every stage of a recipe writes
    file = os.path.relpath(report.artefact.path, report.out or "")
    resolver.place(str(step.folder), Placed(folder, report.artefact.sha256, f"../{folder.name}", file, shown))


def _adopt(old: Path, folder: Path, key: str) -> None:
    """Link a matching finished stage of the run that is being replaced into the new one."""
    if folder.exists() or not is_complete(old, key):
        return
    temporary = folder.with_name(f".{folder.name}.adopt")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(old, temporary, copy_function=_link)
    rename(temporary, folder)


def _link(source: str, target: str) -> None:
    commit_point(f"link {Path(target).name}")
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        copy_file(Path(source), Path(target))


def _write_run(done: Done, output: Output, console: Console) -> None:
    folder = output.work
    with Journal(folder / "events.jsonl", durable=False) as events:
        Log(console, events).event("end", stages=len(done.steps))
    write_bytes(folder / "recipe.lock.yaml", redact(dump_yaml(_lock(done))).encode())
    inputs = {s.name: describe_inputs(done.jobs[s.name])["inputs"] for s in done.steps}
    for entry in (e for entries in inputs.values() for e in entries):
        stage = entry["sha256"].removeprefix("stage:")
        entry["sha256"] = f"stage:{done.shared[stage]}" if stage in done.shared else entry["sha256"]
    links = {"schema": INPUTS_SCHEMA, "key": output.key, "stages": inputs}
    write_json(folder / "inputs.json", redact_tree(links))
    write_json(folder / "environment.json", describe_environment())
    report = Report.from_json(redact_tree(_summarise(done, output.final).to_json()))
    write_json(folder / "report.json", report.to_json())
    if "sweep" in report.details:
        write_json(folder / SWEEP_FILE, {"schema": "honeloom.sweep/1", **report.details["sweep"]})
    if "ablation" in report.details:
        write_json(folder / ABLATION_FILE, {"schema": "honeloom.ablation/1", "effects": report.details["ablation"]})
    outside = [i for s in done.steps for i in done.jobs[s.name].inputs.values() if i.paths or i.files]
    write_provenance(folder, report, outside, None)
    load_target("honeloom.reporting.page:write_page")(folder, report)


def _lock(done: Done) -> dict[str, Any]:
    """The recipe with every default resolved; of a sweep, with the values of its first point."""
    recipe = done.recipe
    lock = recipe.model_dump(mode="json")
    if not recipe.sweep:
        del lock["sweep"], lock["objectives"]
    if not recipe.ablation:
        del lock["ablation"]
    found: dict[str, dict[str, Any]] = {}
    for step in (s for s in done.steps if "without" not in s.values):
        # A swept variable or seed must stay one; another method has other settings than those of the first.
        as_written = any("." not in key or key.endswith(".type") for key in step.values)
        settled = recipe.stages[step.stage][step.verb] if as_written else _reference(step, done.steps)
        found.setdefault(step.stage, {step.verb: settled})
    return {**lock, "stages": found}


def _reference(step: Step, steps: Sequence[Step]) -> object:
    """The stage's settings with paths of earlier stages written as $name again."""
    names = {str(s.folder): f"${s.stage}" for s in steps}

    def walk(value: object) -> object:
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v) for v in value]
        return names.get(value, value) if isinstance(value, str) else value

    return walk(step.config.model_dump(mode="json"))


def _summarise(done: Done, out: Path) -> Report:
    recipe, steps = done.recipe, done.steps
    reports = [done.reports[s.name] for s in steps]
    sweep, ablation = (told(recipe, done.reports, done.shared) for told in (compare_points, effects))
    stages = [
        {
            "name": step.name,
            "verb": step.verb,
            "out": report.out,
            "artefact": asdict(report.artefact) if report.artefact else None,
            "needs": list(dict.fromkeys(done.shared.get(n, n) for n in step.needs)),
            "seconds": report.cost.seconds,
            **({"without": step.values["without"]} if "without" in step.values else {}),
        }
        for step, report in zip(steps, reports, strict=True)
    ]
    named = list(zip(steps, reports, strict=True))
    digests = {s.name: r.artefact.sha256 for s, r in named if r.artefact}
    return Report(
        verb="run",
        status="ok",
        out=str(out),
        seed=recipe.seed,
        artefact=Artefact("run", str(out), combine_digests(digests)),
        metrics=tuple(replace(m, name=f"{s.name}/{m.name}") for s, r in named for m in r.metrics),
        verification=tuple(replace(c, claim=f"{s.name}: {c.claim}") for s, r in named for c in r.verification),
        warnings=tuple(f"{s.name}: {w}" for s, r in named for w in r.warnings),
        cost=Cost(
            round(sum(r.cost.seconds for r in reports), 3),
            round(sum(r.cost.cpu_seconds for r in reports), 3),
            max(r.cost.peak_rss_bytes for r in reports),
        ),
        details={
            "description": recipe.description,
            "stages": stages,
            "comparisons": [
                r.details["against"]["sentence"]
                for s, r in named
                if r.details.get("against") and "without" not in s.values
            ],
            **({"sweep": sweep} if sweep else {}),
            **({"ablation": ablation} if ablation else {}),
        },
    )
