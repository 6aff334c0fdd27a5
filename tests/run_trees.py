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
        found[name] = "" if path.name in VOLATILE else hashlib.sha256(data).hexdigest()
    return found


def _without_cost(document: dict[str, Any]) -> dict[str, Any]:
    del document["cost"]
    for stage in document["details"].get("stages", []):
        del stage["seconds"]
    return document
