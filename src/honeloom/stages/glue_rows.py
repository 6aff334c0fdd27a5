"""The rows of `glue`: those that choose and those that report, kept apart; and what each model makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from honeloom.data.overlap import overlap, question_digests
from honeloom.data.rowset import RowSet
from honeloom.data.writer import write_selected
from honeloom.errors import RowsError
from honeloom.stages.evaluate import EXAMPLES
from honeloom.stages.glue_jobs import SCRATCH, Jobs
from honeloom.stages.row_records import CALIBRATION_FILE, write_table
from honeloom.stages.rows import tell_rejected
from honeloom.stages.work import Work
from honeloom.zoo.config import GlueConfig

__all__ = ["GlueRows", "Part", "Scored", "read_glue_rows", "score_all", "side_of"]

_LEAST = 4
"""Rows per part below which nothing can be said."""


@dataclass(frozen=True)
class Part:
    """Rows in one file, in one order for all models."""

    file: Path
    rows: RowSet

    @property
    def domains(self) -> list[str]:
        """Of every row; "" where none is labelled."""
        return [domain or "" for domain in self.rows.domains]


@dataclass(frozen=True)
class GlueRows:
    """What chooses, and what reports."""

    search: Part
    report: Part
    metric: str


@dataclass(frozen=True)
class Scored:
    """What a model made of a part: summed value and weight of every row, (R, 2); NaN where it cannot read the row."""

    values: npt.NDArray[np.float64]
    routes: Mapping[str, str]


def side_of(row_id: str, what: str) -> float:
    """A place in [0, 1) that follows from a row's id and a purpose, and not from other splits of the same rows."""
    digest = hashlib.blake2b(f"{what}\0{row_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def read_glue_rows(work: Work[GlueConfig]) -> GlueRows:
    """Read both parts, refuse what stands in both, and lay them into the scratch folder.

    Raises
    ------
    RowsError
        The parts share a row or a question, or one of them is nearly empty.
    """
    search = _scan(work, "search_rows")
    if work.config.report_rows:
        report = _scan(work, "report_rows")
    else:
        kept = [i for i, row_id in enumerate(search.ids) if side_of(row_id, "glue/report") >= 0.5]
        report, search = search.take(kept), search.take(sorted(set(range(len(search))) - set(kept)))
        work.log.say(f"glue: no report_rows, so {len(report)} of the search rows are kept for the report")
    for name, rows in (("search", search), ("report", report)):
        if len(rows) < _LEAST:
            raise RowsError(f"{name} rows: {len(rows)}, and at least {_LEAST} are needed; give more rows")
    _require_apart(search, report)
    folder = work.dir / SCRATCH / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    write_table(work.dir / CALIBRATION_FILE, {"id": search.ids})
    return GlueRows(_keep(search, folder, "search"), _keep(report, folder, "report"), _metric(work.config, search))


def _scan(work: Work[GlueConfig], field: str) -> RowSet:
    config = work.config
    rows = RowSet.scan(
        [f for i in work.rows(field) for f in i.files], limit=config.limit, strict=config.strict, max_bad=config.max_bad
    )
    tell_rejected(work, rows)
    return rows


def _require_apart(search: RowSet, report: RowSet) -> None:
    same = sorted(set(search.ids) & set(report.ids))
    if same:
        raise RowsError(
            f"{len(same)} rows stand in search_rows and in report_rows (first id {same[0]!r}): numbers of rows "
            "that chose the merge would flatter it; take them out of one of the two, or leave report_rows out"
        )
    asked = overlap(question_digests(search), report)
    if asked["rows"]:
        first = asked["examples"][0]
        raise RowsError(
            f"{asked['rows']} report rows ask a question that a search row asks (first {first['where']}); take them out"
        )


def _keep(rows: RowSet, folder: Path, name: str) -> Part:
    file = write_selected(rows, range(len(rows)), folder, name)
    return Part(file, rows)


def _metric(config: GlueConfig, rows: RowSet) -> str:
    kinds = {row.kind for row in rows}
    wanted = config.target.metric
    if wanted == "auto":
        return "accuracy" if kinds == {"choice"} else "bits_per_char"
    if wanted == "accuracy" and kinds != {"choice"}:
        raise RowsError("target accuracy needs multiple-choice rows alone; the search rows hold others")
    return wanted


def score_all(jobs: Jobs, part: Part, models: Mapping[str, str], metric: str, *, kind: str) -> dict[str, Scored]:
    """What models make of a part, each by an evaluation that is found again.

    Parameters
    ----------
    jobs : Jobs
        Runs `evaluate`.
    part : Part
        The rows.
    models : mapping
        Name -> what settings call it.
    metric : str
        bits_per_char, loss or accuracy.
    kind : str
        Of the part, for folders and messages.
    """
    config: GlueConfig = jobs.work.config
    found = {}
    for name, model in models.items():
        report = jobs.run(
            "evaluate", jobs.scratch / f"scores-{kind}" / name, f"evaluate {name} on the {kind} rows",
            model=model, rows=[str(part.file)], batch_size=config.batch_size, max_length=config.max_length,
            max_bad=1.0, device=config.device, dtype=config.dtype, seed=config.seed,
        )  # fmt: skip
        found[name] = _read_scores(jobs.folder_of(report), part.rows.ids, metric)
        if unread := int(np.isnan(found[name].values).any(axis=1).sum()):
            jobs.work.log.warn(
                f"{name} cannot read {unread} of {len(part.rows)} {kind} rows, for example because a prompt alone is "
                "longer than it takes; they count as the worst that any other model made of them"
            )
    return found


def _read_scores(folder: Path, ids: Sequence[str], metric: str) -> Scored:
    """Values of every row from an evaluation's table, and the expert that answered it, of a mixture of models."""
    table = pq.read_table(folder / EXAMPLES).to_pydict()
    place = {row_id: i for i, row_id in enumerate(ids)}
    values = np.full((len(ids), 2), np.nan)
    for n, row_id in enumerate(table["id"]):
        if metric == "accuracy":
            terms = (1.0 - float(table["correct"][n] or 0), 1.0)
        elif metric == "loss":
            terms = (table["loss_sum"][n], float(table["tokens"][n]))
        else:
            terms = (table["loss_sum"][n] / np.log(2), float(table["chars"][n]))
        values[place[row_id]] = terms
    routes = dict(zip(table["id"], table["expert"], strict=True)) if "expert" in table else {}
    return Scored(values, routes)
