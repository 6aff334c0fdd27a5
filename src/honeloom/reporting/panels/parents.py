"""Panels of `merge`: the result beside its parents, and how their tokens were matched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from honeloom.reporting.panel import Panel, by_name, figure, row_height, vertical_line
from honeloom.reporting.text import clip, name, number
from honeloom.types.report import Report

__all__ = ["parents_panel", "tokens_panel"]


def parents_panel(folder: Path, report: Report) -> Panel | None:
    """Loss on two plain sentences of every parent and of the result; None where none was measured."""
    probe = report.details.get("probe") or {}
    digests = {m["model"]: m["sha256"] for m in report.details.get("models", ())}
    losses = {p["model"]: p["loss"] for p in probe.get("parents", ()) if p["loss"] is not None}
    result = probe.get("loss")
    if result is None or not losses:
        return None
    called = _short(list(losses))
    rows = [(called[m], loss, loss - result, (digests.get(m) or "")[:16]) for m, loss in losses.items()]
    shown = list(losses)[:30]
    chart = figure(
        [{"type": "bar", "orientation": "h", "x": [losses[m] for m in shown], "y": list(range(len(shown))),
          "text": [number(losses[m]) for m in shown], "textposition": "auto"}],
        x="nats per token", y="", height=row_height(len(shown)), yaxis=by_name([called[m] for m in shown]),
        shapes=[vertical_line(result)],
    )  # fmt: skip
    return Panel(
        title="The result beside its parents",
        columns=("parent", "loss, nats per token", "above the result", "sha256"),
        rows=rows,
        figure=chart,
        note=f"Loss on two plain sentences, which shows a merge that forgot how to write and nothing finer: the "
        f"result's is {number(result)} (dashed). Evaluate the result on rows of your own.",
        alt=f"Bar chart of the loss of {len(shown)} parents; a line at the result's, {number(result)}",
    )


def _short(models: Sequence[str]) -> dict[str, str]:
    """The last part of each path, where that tells them apart."""
    last = {m: Path(m).name or m for m in models}
    return last if len(set(last.values())) == len(models) else {m: name(m) for m in models}


def tokens_panel(folder: Path, report: Report) -> Panel | None:
    """What was found when tokens were matched; None where rows were merged as they are."""
    tokens = report.details.get("tokenizer")
    if not tokens:
        return None
    return Panel(
        title="Tokens",
        columns=("finding",),
        rows=[(finding,) for finding in tokens["findings"]] or [("All models have the same tokens.",)],
        note=f"The vocabulary is that of {clip(tokens['source'])} with {tokens['added']:,} tokens added: "
        f"{tokens['tokens']:,} tokens in {tokens['rows']:,} rows.",
    )
