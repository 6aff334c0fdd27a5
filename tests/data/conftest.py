"""Fixtures of the row layer's tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard


@pytest.fixture
def alpaca() -> Callable[..., dict[str, Any]]:
    """Make one alpaca row."""

    def make(i: int, **more: Any) -> dict[str, Any]:
        return {
            "id": f"r{i}",
            "instruction": f"Say number {i}.",
            "input": "",
            "output": f"number {i}",
            **more,
        }

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write records (as JSON lines) or bytes to a file whose name tells the compression."""

    def write(name: str, content: bytes | Iterable[dict[str, Any]]) -> Path:
        if not isinstance(content, bytes):
            content = b"".join(json.dumps(record).encode() + b"\n" for record in content)
        if name.endswith(".gz"):
            content = gzip.compress(content)
        elif name.endswith(".zst"):
            content = zstandard.ZstdCompressor().compress(content)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write
