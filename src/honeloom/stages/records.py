"""Looking back at finished folders: verify, and the page made again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from honeloom.checkpoint.headers import inspect_weights
from honeloom.errors import SourceError
from honeloom.registry import load_target
from honeloom.runs.atomic import remove_temporaries
from honeloom.runs.lock import writer_lock
from honeloom.runs.manifest import load_manifest, refresh_manifest, verify_folder
from honeloom.runs.output import locate
from honeloom.stages.lineage_nodes import results_below
from honeloom.stages.runner import load_report
from honeloom.system import peak_rss
from honeloom.types.report import Check, Cost, Report

__all__ = ["render_report", "verify"]


def verify(path: str | Path) -> Report:
    """Re-check a folder that honeloom wrote.

    Every file's size and SHA-256 is compared with the manifest, unlisted files are problems,
    and the header of every safetensors file is parsed.

    Returns
    -------
    Report
        `details` has `files` (checked) and `problems`; `status` is failed if there are any.
    """
    started, cpu = time.monotonic(), time.process_time()
    count, problems = verify_folder(Path(path), inspect=_inspect)
    return Report(
        verb="verify",
        status="failed" if problems else "ok",
        out=None,
        seed=0,
        artefact=None,
        verification=(Check("every file is as its manifest says", len(problems), 0, not problems),),
        cost=Cost(round(time.monotonic() - started, 3), round(time.process_time() - cpu, 3), peak_rss()),
        details={"path": str(path), "files": count, "problems": [asdict(p) for p in problems]},
    )


def _inspect(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        return inspect_weights(path)
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"not JSON: {error}"
    return None


def render_report(run: Path) -> Path:
    """Write `report.html` from `report.json` again, and take it into the manifest.

    Of a folder that is no result and holds some, write `index.html`: their names, verbs, times and main numbers.
    """
    run = locate(run)
    if run.is_dir() and load_manifest(run) is None and (found := results_below(run)):
        reports = [(folder, load_report(folder)) for folder in found]
        index: Path = load_target("honeloom.reporting.index_page:write_index")(run, reports, _unfinished(run))
        return index
    _require_result(run)
    with writer_lock(run):
        remove_temporaries(run)
        page: Path | None = load_target("honeloom.reporting.page:write_page")(run, load_report(run))
        if page is None:
            raise SourceError("report.html needs plotly: pip install 'honeloom[report]'")
        refresh_manifest(run, [page.name])
    return page


def _unfinished(folder: Path) -> list[Path]:
    """Attempts beside the results that were interrupted and are not being worked on."""
    return [p for p in sorted(folder.rglob(".*.partial-*")) if p.is_dir() and ".partial-" not in str(p.parent)]


def _require_result(run: Path) -> None:
    if not run.is_dir():
        raise SourceError(f"{run}: no such folder; give the one that --output-dir named")
    if load_manifest(run) is None:
        raise SourceError(
            f"{run} is not a finished honeloom result (no sound manifest.json); give the folder that --output-dir named"
        )
