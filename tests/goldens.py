"""Frozen files: compare with them, or write them anew with HONELOOM_WRITE_GOLDEN=1."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("HONELOOM_WRITE_GOLDEN") == "1":
        file.write_text(text)
    assert text == file.read_text()


def check_json(name: str, value: Any) -> None:
    check(name, json.dumps(value, indent=2, sort_keys=True) + "\n")
