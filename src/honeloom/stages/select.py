"""`select`: score the rows, keep the best, write both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.score import Scorer
from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.data.writer import write_rejected, write_selected
from honeloom.errors import ConfigError, RowsError
from honeloom.registry import family
from honeloom.selection.choose import take_best
from honeloom.selection.config import SelectConfig
from honeloom.stages.row_records import write_table
from honeloom.stages.rows import limit_text, scan
from honeloom.stages.work import Outcome, Work
from honeloom.types.plans import Scores, SelectPlan
from honeloom.types.ports import SelectionData
from honeloom.types.report import Check, Metric

__all__ = ["execute"]

CLUSTER_COLUMNS = {
    "cluster": pa.int64(), "size": pa.int64(), "proxy_id": pa.string(), "value": pa.float64(),
    "stderr": pa.float64(), "p_select": pa.float64(),
}  # fmt: skip


def execute(work: Work[SelectConfig]) -> Outcome:
    """Run a selection."""
    config = work.config
    rows = scan(work, near_duplicates=config.near_duplicates)
    scorer = _opener(work)
    work.log.say(f"select: {config.method.type} over {len(rows)} rows")
    method = family("selection").load(config.method.type)
    settings = config.method.model_dump(exclude={"type"})
    scores: Scores = method(SelectionData(rows, scorer, config.seed), **settings)
    plan = _choose(work, rows, scores, scorer)
    _warn_unscored(work, scores, plan, scorer)
    selected = write_selected(rows, plan.keep, work.dir)
    write_rejected(rows.rejected, work.dir / "rejected.parquet")
    _write_scores(work, rows, scores, plan)
    write_table(work.dir / "clusters.parquet", {name: pa.array([], kind) for name, kind in CLUSTER_COLUMNS.items()})
    (work.dir / "evaluations.jsonl").touch()  # the ledger of utility evaluations; these methods spend none
    details = {
        "rows_in": rows.counts.rows_in,
        "rows_usable": len(rows),
        "rows_kept": len(plan.keep),
        "method": config.method.type,
        "evaluations": 0,
        "noise": None,
        "rejected": dict(rows.counts.rejected),
    }
    checks = _verify(work, rows, plan, selected.name)
    kept = Metric("rows_kept", len(plan.keep), len(rows), "rows", True, None, "all")
    return Outcome("rows", selected.name, (kept,), checks, details)


def _opener(work: Work[SelectConfig]) -> Callable[[], Scorer]:
    """Load the model once, and only if the method asks for it."""
    held: list[Scorer] = []

    def open_model() -> Scorer:
        if not held:
            if "model" not in work.inputs:
                raise ConfigError(f"method {work.config.method.type!r} needs a model (--model)")
            config, found = work.config, work.inputs["model"]
            held.append(
                Scorer.open(
                    found.paths[0],
                    base=found.base,
                    loading=Loading.of(config, spread=True),
                    batch_size=config.batch_size,
                    max_length=config.max_length,
                    progress=work.log.track,
                )
            )
        return held[0]

    return open_model


def _choose(work: Work[SelectConfig], rows: RowSet, scores: Scores, scorer: Callable[[], Scorer]) -> SelectPlan:
    config = work.config
    amount, unit = config.keep_amount()
    if all(v == -math.inf for v in scores.value):
        cut = _cut(scores)
        why = f"; {cut} are cut at the model limit, raise --max-length or shorten them" if cut else ""
        raise RowsError(f"{config.method.type}: none of the {len(rows)} rows could be scored by {config.model}{why}")
    if unit == "rows" and amount > len(rows):
        work.log.warn(f"keep {config.keep}: only {len(rows)} rows are usable; all of them are kept")
    tokens = None
    if unit == "tokens":
        port = scorer()
        tokens = [port.count_tokens(f"{row.prompt}\n{row.response}") for row in rows]
    plan = take_best(scores, rows.ids, amount=amount, unit=unit, seed=config.seed, tokens=tokens)
    if not plan.keep:
        raise RowsError(f"keep {config.keep}: not even one row fits; raise the token budget")
    return plan


def _warn_unscored(work: Work[SelectConfig], scores: Scores, plan: SelectPlan, scorer: Callable[[], Scorer]) -> None:
    missing = sum(1 for v in scores.value if v == -math.inf)
    if missing:
        kept = sum(1 for i in plan.keep if scores.value[i] == -math.inf)
        work.log.warn(f"{missing} rows could not be scored; they come last, and {kept} of them are kept")
    if cut := _cut(scores):
        limit = limit_text(scorer(), work.config.max_length)
        work.log.warn(f"{cut} rows were cut at {limit}; their losses cover a part of the response and do not count")


def _cut(scores: Scores) -> int:
    return sum((scores.columns or {}).get("truncated", ()))


def _write_scores(work: Work[SelectConfig], rows: RowSet, scores: Scores, plan: SelectPlan) -> None:
    chosen = set(plan.keep)
    columns: dict[str, Any] = {
        "id": rows.ids,
        "score": [v if math.isfinite(v) else None for v in scores.value],
        "stderr": list(scores.stderr) if scores.stderr else pa.nulls(len(rows), pa.float64()),
        "count": list(scores.count) if scores.count else pa.nulls(len(rows), pa.int64()),
        "cluster": pa.nulls(len(rows), pa.int64()),
        "selected": [i in chosen for i in range(len(rows))],
        "source": rows.sources,
        "domain": rows.domains,
        **{name: list(values) for name, values in (scores.columns or {}).items()},
    }
    write_table(work.dir / "scores.parquet", columns)


def _verify(work: Work[SelectConfig], rows: RowSet, plan: SelectPlan, name: str) -> tuple[Check, ...]:
    """Read the written file back and compare it with the plan."""
    back = RowSet.scan(resolve_sources([str(work.dir / name)]))
    wanted = [rows.ids[i] for i in plan.keep]
    return (
        Check(
            "the file holds exactly the chosen rows, in the input's order", len(back), len(wanted), back.ids == wanted
        ),
    )
