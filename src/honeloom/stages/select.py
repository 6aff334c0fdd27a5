"""`select`: score the rows, keep the best, write both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa

from honeloom.backends.hf.score import Scorer
from honeloom.data.overlap import repeats
from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.data.writer import write_rejected, write_selected
from honeloom.errors import RowsError
from honeloom.registry import family, suggest
from honeloom.runs.journal import read_journal
from honeloom.selection.choose import Quotas, rows_to_keep, take_best
from honeloom.selection.config import SelectConfig
from honeloom.stages.row_records import TARGET_FILE, write_questions, write_table
from honeloom.stages.rows import limit_text, scan
from honeloom.stages.select_ports import LEDGER, Ports
from honeloom.stages.work import Outcome, Work
from honeloom.types.plans import Scores, SelectPlan
from honeloom.types.report import Check, Metric
from honeloom.types.rows import Rejected

__all__ = ["execute"]

CLUSTER_COLUMNS = {
    "cluster": pa.int64(), "size": pa.int64(), "proxy_id": pa.string(), "value": pa.float64(),
    "stderr": pa.float64(), "p_select": pa.float64(),
}  # fmt: skip


def execute(work: Work[SelectConfig]) -> Outcome:
    """Run a selection."""
    config = work.config
    rows = scan(work, near_duplicates=config.near_duplicates)
    if config.must_drop is not None:
        rows = _without(work, rows, _named(work, "must_drop", rows))
    kept_ids = {rows.ids[i] for i in _named(work, "must_keep", rows)} if config.must_keep is not None else set()
    target = scan(work, field="target") if config.target else None
    if target is not None:
        rows = _without_target(work, rows, target)
    forced = _forced(rows, kept_ids)
    if config.quota and config.quota_by != "cluster":
        _quotas(work, rows, None)  # before hours of work, where the names are known already
    ports = Ports(work)
    work.log.say(f"select: {config.method.type} over {len(rows)} rows")
    method = family("selection").load(config.method.type)
    settings = {name: getattr(config.method, name) for name in type(config.method).model_fields if name != "type"}
    settings |= {n: str(work.inputs[f"method.{n}"].paths[0]) for n in settings if f"method.{n}" in work.inputs}
    amount, unit = config.keep_amount()
    wanted = None if unit == "tokens" else rows_to_keep(amount, unit, len(rows))
    if wanted is not None and len(forced) > wanted:
        raise RowsError(f"must_keep names {len(forced)} rows, and {wanted} are kept; raise --keep, or name fewer")
    scores: Scores = method(ports.data(rows, target, wanted), **settings)
    ports.close()
    plan = _choose(work, rows, scores, ports.scorer, forced)
    _warn_unscored(work, scores, plan, ports.scorer)
    selected = write_selected(rows, plan.keep, work.dir)
    write_rejected(rows.rejected, work.dir / "rejected.parquet")
    _write_scores(work, rows, scores, plan)
    _write_clusters(work, scores)
    if target is not None:
        write_questions(work.dir / TARGET_FILE, target)
    (work.dir / LEDGER).touch()  # most methods evaluate no utility
    details = {
        "rows_in": rows.counts.rows_in,
        "rows_usable": len(rows),
        "rows_kept": len(plan.keep),
        "method": config.method.type,
        "evaluations": 0,
        "noise": _noise(scores),
        "rejected": dict(Counter(r.kind for r in rows.rejected)),
        **scores.details,
    }
    checks = _verify(work, rows, plan, selected.name, details)
    kept = Metric("rows_kept", len(plan.keep), len(rows), "rows", True, None, "all")
    return Outcome("rows", selected.name, (kept,), checks, details)


def _named(work: Work[SelectConfig], field: str, rows: RowSet) -> list[int]:
    """Places of the rows that a list names: a file of rows, or of an id per line.

    Raises
    ------
    RowsError
        The list is empty, or names a row to keep that is not there, or no row at all.
    """
    path = work.inputs[field].paths[0]
    if path.suffix == ".txt":
        try:
            ids = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
        except UnicodeDecodeError as error:
            raise RowsError(f"{path}: not a text file of ids ({error.reason}); write an id per line in UTF-8") from None
    else:
        ids = set(RowSet.scan(resolve_sources([str(path)])).ids)
    found = [i for i, name in enumerate(rows.ids) if name in ids]
    lacking = sorted(ids - {rows.ids[i] for i in found})
    if not found or (lacking and field == "must_keep"):
        raise RowsError(
            f"{field}: {len(lacking)} of the {len(ids)} rows that {path} names are not among the {len(rows)} usable "
            f"rows{f' (first: {lacking[0]})' if lacking else ''}; ids are those of scores.parquet"
        )
    if lacking:
        work.log.say(f"must_drop: {len(lacking)} of {len(ids)} ids are not among the usable rows")
    return found


def _without(work: Work[SelectConfig], rows: RowSet, places: list[int]) -> RowSet:
    """The rows less those that must be dropped."""
    out = set(places)
    if len(out) == len(rows):
        raise RowsError(f"must_drop names all {len(rows)} rows, so none is left to choose; name fewer")
    rejected = [Rejected(row.where, "named in must_drop", row.id, "must_drop")
                for i, row in enumerate(rows) if i in out]  # fmt: skip
    work.log.say(f"must_drop: {len(out)} rows are left out")
    return replace(rows.take(i for i in range(len(rows)) if i not in out), rejected=[*rows.rejected, *rejected])


def _without_target(work: Work[SelectConfig], rows: RowSet, target: RowSet) -> RowSet:
    """Refuse, or leave out, rows that repeat a row of the target: their value would be a mirage.

    Raises
    ------
    RowsError
        There are such rows, and `overlap` is refuse; or no others.
    """
    found = list(repeats(work.log.track(target, "read the target", len(target)), rows))
    if not found:
        return rows
    _, row, what = found[0]
    told = f"{len(found)} of {len(rows)} rows repeat a row of the target (first {row.where}: {what})"
    if work.config.overlap == "refuse":
        raise RowsError(
            f"{told}; what is valued by the target must not hold it: give other target rows, or leave these rows out "
            "of the choice with --overlap leave_out"
        )
    work.log.warn(f"{told}; they are left out")
    out = {place for place, _, _ in found}
    if len(out) == len(rows):
        raise RowsError(f"all {len(rows)} rows repeat a row of the target, so none is left to choose; give other rows")
    rejected = [Rejected(row.where, f"repeats {what} of a target row", row.id, "target_overlap")
                for _, row, what in found]  # fmt: skip
    return replace(rows.take(i for i in range(len(rows)) if i not in out), rejected=[*rows.rejected, *rejected])


def _noise(scores: Scores) -> dict[str, Any] | None:
    if scores.noise is None:
        return None
    return {**asdict(scores.noise), "resolvable": scores.resolvable}


def _choose(
    work: Work[SelectConfig], rows: RowSet, scores: Scores, scorer: Callable[[], Scorer], forced: set[int]
) -> SelectPlan:
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
    quotas = _quotas(work, rows, scores) if config.quota else None
    plan = take_best(
        scores, rows.ids, amount=amount, unit=unit, seed=config.seed, tokens=tokens, first=forced, quotas=quotas
    )
    if quotas is not None and unit != "tokens" and len(plan.keep) < (n := rows_to_keep(amount, unit, len(rows))):
        work.log.warn(
            f"quota: {len(plan.keep)} rows are kept, not {n}: groups with a quota have too few, and no other group has "
            "any left"
        )
    if not plan.keep:
        raise RowsError(f"keep {config.keep}: not even one row fits; raise the token budget")
    return plan


def _forced(rows: RowSet, kept_ids: set[str]) -> set[int]:
    """Places of the rows that must be kept."""
    forced = {i for i, name in enumerate(rows.ids) if name in kept_ids}
    if len(forced) < len(kept_ids):
        raise RowsError(
            f"must_keep: {len(kept_ids) - len(forced)} of {len(kept_ids)} rows repeat a row of the target; leave them "
            "out of one of the two"
        )
    return forced


def _quotas(work: Work[SelectConfig], rows: RowSet, scores: Scores | None) -> Quotas:
    """Groups of the rows, and the shares that some of them get."""
    config, columns = work.config, (scores.columns if scores else None) or {}
    if config.quota_by == "cluster":
        group = columns.get("pseudo_domain", columns.get("cluster"))
        if group is None:
            raise RowsError(
                f"quota_by cluster: method {config.method.type!r} makes no clusters; use domain or source, or a method "
                "that does (shed, daar, band)"
            )
    else:
        group = rows.domains if config.quota_by == "domain" else rows.sources
    names = [None if g is None else str(g) for g in group]
    known = sorted({n for n in names if n is not None})
    if unknown := [name for name in config.quota if name not in known]:
        shown = ", ".join(known[:12]) + (f", and {len(known) - 12} more" if len(known) > 12 else "")
        raise RowsError(
            f"quota: no row has the {config.quota_by} {unknown[0]!r}{suggest(unknown[0], known)} (known: "
            f"{shown or 'none'})"
        )
    return Quotas(names, config.quota)


def _warn_unscored(work: Work[SelectConfig], scores: Scores, plan: SelectPlan, scorer: Callable[[], Scorer]) -> None:
    missing = sum(1 for v in scores.value if v == -math.inf) - sum((scores.columns or {}).get("held_out", ()))
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
    if scores.order is not None:
        rank = np.empty(len(rows), dtype=np.int64)
        rank[np.array(scores.order)] = np.arange(len(rows))
        columns["rank"] = rank
    write_table(work.dir / "scores.parquet", columns)


def _write_clusters(work: Work[SelectConfig], scores: Scores) -> None:
    columns = {name: pa.array([], kind) for name, kind in CLUSTER_COLUMNS.items()}
    if scores.clusters is not None:
        length = len(scores.clusters["cluster"])
        given = {name: list(values) for name, values in scores.clusters.items()}
        columns = {
            **{name: pa.array(given.get(name, [None] * length), kind) for name, kind in CLUSTER_COLUMNS.items()},
            **{name: pa.array(values) for name, values in given.items() if name not in CLUSTER_COLUMNS},
        }
    write_table(work.dir / "clusters.parquet", columns)


def _verify(
    work: Work[SelectConfig], rows: RowSet, plan: SelectPlan, name: str, details: dict[str, Any]
) -> tuple[Check, ...]:
    """Read the written files back and compare them with the plan and the budget."""
    back = RowSet.scan(resolve_sources([str(work.dir / name)]))
    wanted = [rows.ids[i] for i in plan.keep]
    checks = [
        Check(
            "the file holds exactly the chosen rows, in the input's order", len(back), len(wanted), back.ids == wanted
        )
    ]
    if spent := details["evaluations"]:
        budget = details["budget"]
        checks.append(Check("the budget is kept: evaluations", spent, budget, spent <= budget))
        keys = [record["key"] for record in read_journal(work.dir / LEDGER)]
        twice = len(keys) - len(set(keys))
        checks.append(Check("no evaluation was paid for twice: repeated records", twice, 0, bool(keys) and not twice))
    return tuple(checks)
