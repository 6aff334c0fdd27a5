"""Digests of what a run left, without what may differ between two runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

VOLATILE = {"events.jsonl", "environment.json", "manifest.json", "report.html"}
"""Files that hold times, versions or digests of such files."""


def snapshot(out: Path) -> dict[str, str]:
    """Digest of every file that must be equal, by its name."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        data = path.read_bytes()
        if path.name == "report.json":
            data = json.dumps(_without_cost(json.loads(data)), sort_keys=True).encode()
        if path.name == "rounds.jsonl":
            data = json.dumps([_without_seconds(json.loads(line)) for line in data.splitlines()]).encode()
        found[name] = "" if path.name in VOLATILE else hashlib.sha256(data).hexdigest()
    return found


def _without_cost(document: dict[str, Any]) -> dict[str, Any]:
    """Without what a result took, and whether importances were known from before, which a killed run leaves."""
    del document["cost"]
    document["details"].pop("scores_reused", None)
    for stage in document["details"].get("stages", []):
        del stage["seconds"]
    return document


_COSTS = {"seconds", "server_seconds", "peak_rss_bytes"}


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k not in _COSTS}
    return [_without_seconds(v) for v in value] if isinstance(value, list) else value
