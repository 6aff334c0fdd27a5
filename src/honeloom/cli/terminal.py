"""What a person sees: messages, progress, tables. The only place that uses rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from honeloom.runs.redact import redact
from honeloom.types.plans import Needs, StagePlan, Volume
from honeloom.types.report import Metric, Report
from honeloom.types.views import PlanList, size_text

__all__ = ["Terminal"]

PIPED_WIDTH = 200
"""Columns of tables where there is no terminal: wide enough that paths are not cut."""


class _RateColumn(ProgressColumn):
    """Items per second, or seconds per item where they take longer."""

    def render(self, task: Task) -> Text:
        """The rate of the last seconds, as `12/s` or `3.4 s each`."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.{0 if speed >= 10 else 1}f}/s" if speed >= 1 else f"{1 / speed:,.1f} s each")


class Terminal:
    """Prints to stdout, or to stderr when stdout carries a JSON document."""

    def __init__(self, as_json: bool = False) -> None:
        stream = sys.stderr if as_json else sys.stdout
        width = None if stream.isatty() else PIPED_WIDTH
        self.out = Console(stderr=as_json, highlight=False, soft_wrap=True, width=width)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self.out.print(Text(text))

    def warn(self, text: str) -> None:
        """Print one warning on stderr."""
        self.err.print(Text(f"warning: {text}", style="yellow"))

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar with count, rate and time left on a terminal; nothing when piped."""
        if not sys.stderr.isatty():
            yield lambda amount: None
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),  # all columns fit in 80 characters
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda amount: bar.advance(task, amount)

    def show_report(self, report: Report) -> None:
        """Print metrics and verification of a finished verb."""
        if report.verb == "run":
            self._show_run(report)
        elif report.metrics:
            self.out.print(_metric_table(report.metrics))
        comparison = report.details.get("against")
        if comparison:
            self.say(comparison["sentence"])
        for check in report.verification:
            mark = Text("ok  ", style="green") if check.passed else Text("FAIL", style="red")
            self.out.print(Text.assemble(mark, f" {check.claim}: {_short(check.value)} (limit {_short(check.limit)})"))

    def _show_run(self, report: Report) -> None:
        """Print the run's evaluations side by side and what was compared."""
        if sweep := report.details.get("sweep"):
            self._show_sweep(sweep)
            return
        name, columns = evaluation_columns(report)
        if columns:
            domains = list(dict.fromkeys(d for values in columns.values() for d in values))
            table = Table("domain", *columns, box=None, pad_edge=False, title=name, title_justify="left")
            for domain in domains:
                cells = [f"{values[domain].value:.4f}" if domain in values else "" for values in columns.values()]
                table.add_row(Text(domain), *cells)
            self.out.print(table)
        for sentence in report.details["comparisons"]:
            self.say(sentence)
        if ablation := report.details.get("ablation"):
            self._show_ablation(ablation)

    def _show_points(self, plans: Sequence[StagePlan], count: int) -> None:
        """Print the points of a sweep or ablation, and which stages several of them share."""
        runs = sum(len(p.points) for p in plans)
        what = "ablation" if any("without" in p.values for p in plans) else "sweep"
        self.say(f"{what} of {count} points: {len(plans)} stages instead of {runs}")
        for point in range(1, count + 1):
            mine = [p for p in plans if point in p.points]
            values = {key: value for p in mine for key, value in p.values.items()}
            said = ", ".join(f"{key}={value}" for key, value in values.items())
            self.say(f"  point {point}: {said}: {', '.join(p.stage for p in mine)}")
        shared = [f"{p.stage} ({len(p.points)} points)" for p in plans if len(p.points) > 1]
        self.say(f"  shared: {', '.join(shared) or 'none'}")

    def _show_sweep(self, sweep: Mapping[str, Any]) -> None:
        """Print the points of a sweep by their objectives."""
        names = [o["name"] for o in sweep["objectives"]]
        title = "points (* no other is as good in everything and better in something)"
        table = Table("point", *sweep["keys"], *names, box=None, pad_edge=False, title=title, title_justify="left")
        for point in sweep["points"]:
            values = [str(point["values"][key]) for key in sweep["keys"]]
            numbers = [point["objectives"][n]["value"] for n in names]
            cells = [*values, *("" if v is None else _short(v) for v in numbers)]
            table.add_row(f"{point['point']}{' *' if point['pareto'] else ''}", *map(Text, cells))
        self.out.print(table)

    def _show_ablation(self, effects: Sequence[Mapping[str, Any]]) -> None:
        """Print what came of every replacement, less the whole recipe."""
        title = "with something else in a stage's place, less the whole recipe"
        columns = ("without", "instead", "measured by", "less the whole", "macro, less the whole")
        table = Table(*columns, box=None, pad_edge=False, title=title, title_justify="left")
        for e in effects:
            by = f"{e['metric']} of {e['stage'].partition('.')[0]}"
            table.add_row(*map(Text, (e["without"], e["instead"], by, _interval(e), _interval(e["macro"]))))
        self.out.print(table)

    def _show_needs(self, stage: str, needs: Needs) -> None:
        """Print what a stage needs: memory by part, disk, time, other ways, the command."""
        if needs.unknown:
            self.say(f"{stage}: memory cannot be told: {needs.unknown}")
            return
        parts = ", ".join(f"{name} {_gib(n)}" for name, n in needs.memory.items() if n and name != "total")
        place = "per GPU" if needs.device == "gpu" else "of the host"
        self.say(
            f"{stage} needs, with {needs.parameters:,} parameters and rows of up to {needs.tokens_per_row} tokens:"
        )
        self.say(f"  memory   {_gib(needs.memory['total'])} {place} at the peak ({needs.dtype}): {parts}")
        self.say(f"  disk     {_gib(needs.disk_bytes)}")
        if needs.seconds is not None:
            self.say(f"  time     {needs.tokens:,} tokens in {needs.steps:,} steps, about {_duration(needs.seconds)}")
        for i, way in enumerate(needs.settings):
            self.say(f"  {'on a GPU' if i == 0 else '        '} {_gib(way.memory_bytes):>9}  {way.name}: {way.flags}")
        self.say(f"  command  {needs.command}")
        if needs.sharded_command:
            self.say(f"  sharded  {needs.sharded_command}")

    def _show_costs(self, plans: PlanList) -> None:
        """Print what every stage does and costs, and the sums; then what could not be counted."""
        kept = [i for i, name in enumerate(plans.columns) if name not in ("verb", "state", "reads")]
        rows = plans.table()
        if all(not row[-1] for row in rows):
            kept.pop()
        table = Table(*(plans.columns[i] for i in kept), title="what it takes", title_justify="left")
        for row in rows:
            table.add_row(*(Text(redact(row[i])) for i in kept))
        self.out.print(table)
        for plan in plans:
            volume = plan.volume or Volume()
            for note in (volume.unknown, *volume.notes):
                if note:
                    self.say(f"  {plan.stage}: {note}")
        if bytes_wanted := plans.total["download_bytes"]:
            self.say(f"  downloads: about {size_text(bytes_wanted)}")

    def show_plans(self, plans: Sequence[StagePlan]) -> None:
        """Print one row per stage."""
        table = Table("stage", "verb", "state", "reads", "downloads", title="plan", title_justify="left")
        for plan in plans:
            reads = ", ".join(f"{p}={v}" for p, v in plan.inputs.items())
            downloads = ", ".join(plan.downloads) or "-"
            table.add_row(
                *(
                    Text(redact(c))
                    for c in (plan.stage, plan.verb, plan.state, f"{reads} ({plan.bytes_in:,} bytes)", downloads)
                )
            )
        self.out.print(table)
        if count := max((n for p in plans for n in p.points), default=0):
            self._show_points(plans, count)
        self._show_costs(PlanList(plans))
        for plan in plans:
            if plan.needs is not None:
                self._show_needs(plan.stage, plan.needs)
            for note in plan.notes:
                self.say(f"  {note}")
            if plan.push_to_hub:
                self.say(f"then pushed to {plan.push_to_hub} on the hub; a new repository is private")


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**29 else f"{amount / 2**20:.0f} MiB"


def evaluation_columns(report: Report) -> tuple[str, dict[str, dict[str, Metric]]]:
    """The main metric of a run's evaluate stages: its name, and per stage the metric of every domain."""
    stages = [s["name"] for s in report.details["stages"] if s["verb"] == "evaluate" and not s.get("without")]
    split = [(m.name.split("/", 1), m) for m in report.metrics]
    kind = next((name for (stage, name), _ in split if stage in stages), "")
    columns: dict[str, dict[str, Metric]] = {}
    for (stage, name), metric in split:
        if stage in stages and name == kind:
            columns.setdefault(stage, {})[metric.domain or "all"] = metric
    unit = next((m.unit for values in columns.values() for m in values.values()), "")
    return f"{kind} ({unit})", columns


def _interval(found: Mapping[str, Any] | None) -> str:
    """A difference and where it lies with 95%."""
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(found["difference"], *found["ci95"]) if found else ""


def _metric_table(metrics: Sequence[Metric]) -> Table:
    table = Table("metric", "domain", "value", "± stderr", "n", "unit", box=None, pad_edge=False)
    for m in metrics:
        error = f"{m.stderr:.2g}" if m.stderr is not None else ""
        table.add_row(*(Text(c) for c in (m.name, m.domain or "", f"{m.value:.4f}", error, str(m.n), m.unit)))
    return table


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
