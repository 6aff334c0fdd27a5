"""What a person sees: messages, progress, tables. The only place that uses rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from honeloom.types.plans import StagePlan
from honeloom.types.report import Metric, Report

__all__ = ["Terminal"]


class Terminal:
    """Prints to stdout, or to stderr when stdout carries a JSON document."""

    def __init__(self, as_json: bool = False) -> None:
        self.out = Console(stderr=as_json, highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self.out.print(Text(text))

    def warn(self, text: str) -> None:
        """Print one warning on stderr."""
        self.err.print(Text(f"warning: {text}", style="yellow"))

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar with count and time left on a terminal; nothing when piped."""
        if not sys.stderr.isatty():
            yield lambda amount: None
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda amount: bar.advance(task, amount)

    def show_report(self, report: Report) -> None:
        """Print metrics and verification of a finished verb."""
        if report.metrics:
            self.out.print(_metric_table(report.metrics))
        comparison = report.details.get("against")
        if comparison:
            self.say(comparison["sentence"])
        for check in report.verification:
            mark = Text("ok  ", style="green") if check.passed else Text("FAIL", style="red")
            self.out.print(Text.assemble(mark, f" {check.claim}: {_short(check.value)} (limit {_short(check.limit)})"))

    def show_plans(self, plans: Sequence[StagePlan]) -> None:
        """Print one row per stage."""
        table = Table("stage", "verb", "state", "reads", "downloads", title="plan", title_justify="left")
        for plan in plans:
            reads = ", ".join(f"{p}={v}" for p, v in plan.inputs.items())
            downloads = ", ".join(plan.downloads) or "-"
            table.add_row(
                *(Text(c) for c in (plan.stage, plan.verb, plan.state, f"{reads} ({plan.bytes_in:,} bytes)", downloads))
            )
        self.out.print(table)


def _metric_table(metrics: Sequence[Metric]) -> Table:
    table = Table("metric", "domain", "value", "± stderr", "n", "unit", box=None, pad_edge=False)
    for m in metrics:
        error = f"{m.stderr:.2g}" if m.stderr is not None else ""
        table.add_row(*(Text(c) for c in (m.name, m.domain or "", f"{m.value:.4f}", error, str(m.n), m.unit)))
    return table


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
