"""Looking back at finished folders: verify, lineage, and the page made again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from honeloom.checkpoint.headers import inspect_weights
from honeloom.errors import SourceError
from honeloom.registry import load_target
from honeloom.runs.atomic import remove_temporaries
from honeloom.runs.lock import writer_lock
from honeloom.runs.manifest import load_manifest, refresh_manifest, verify_folder
from honeloom.runs.output import locate
from honeloom.stages.runner import load_report
from honeloom.system import peak_rss
from honeloom.types.report import Check, Cost, Report

__all__ = ["render_report", "trace", "verify"]


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
    """Write `report.html` from `report.json` again, and take it into the manifest."""
    run = locate(run)
    _require_result(run)
    with writer_lock(run):
        remove_temporaries(run)
        page: Path | None = load_target("honeloom.reporting.page:write_page")(run, load_report(run))
        if page is None:
            raise SourceError("report.html needs plotly: pip install 'honeloom[report]'")
        refresh_manifest(run, [page.name])
    return page


def trace(run: Path, row: str | None) -> dict[str, Any]:
    """What a result was made of, stage by stage; for one row, how far it went.

    Returns
    -------
    dict
        `stages`: each with stage, verb, sha256, reads and (for a row) row: what the stage did
        with it ("selected", "trained on", ...) or "through <models>" or "untouched". Models are
        followed to the folders of earlier commands, as far as those still exist.
    """
    _require_result(run)
    folders = sorted((run / "stages").glob("*-*"), key=lambda p: int(p.name.split("-")[0])) or [run]
    stages = []
    for folder in folders:
        report = load_report(folder)
        name = folder.name.split("-", 1)[-1] if folder != run else report.verb
        reads = json.loads((folder / "inputs.json").read_bytes())["inputs"]
        entry = {
            "stage": name,
            "verb": report.verb,
            "sha256": report.artefact.sha256 if report.artefact else "",
            "reads": [{k: r[k] for k in ("place", "kind", "value", "sha256")} for r in reads],
        }
        if row is not None:
            entry["row"] = _what_became_of(row, folder)
        stages.append(entry)
    return {"run": str(run), "row": row, "stages": stages}


def _what_became_of(row: str, folder: Path) -> str:
    direct: str | None = load_target("honeloom.stages.row_records:find_row")(folder, row)
    if direct:
        return direct
    names = load_target("honeloom.stages.row_records:through")(folder, row)
    return f"through {', '.join(names)}" if names else "untouched"


def _require_result(run: Path) -> None:
    if not run.is_dir():
        raise SourceError(f"{run}: no such folder; give the one that --output-dir named")
    if load_manifest(run) is None:
        raise SourceError(
            f"{run} is not a finished honeloom result (no sound manifest.json); give the folder that --output-dir named"
        )
