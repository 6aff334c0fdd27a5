"""The one place where the row layer loads a heavy or optional library, on first need."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from honeloom.errors import MissingExtraError

__all__ = ["lab_rows", "load"]

_PURPOSE = {
    "tables": ("pyarrow", "reading and writing Parquet and Arrow rows"),
    "zstd": ("zstandard", "reading .zst rows"),
    "near": ("datasketch", "finding near duplicates"),
}


def load(module: str) -> Any:
    """Import `honeloom.data.<module>`; the library behind it is named if it is not installed."""
    library, purpose = _PURPOSE[module]
    try:
        return importlib.import_module(f"honeloom.data.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise MissingExtraError(f"{purpose} needs {library}: pip install {library}") from error


def lab_rows(split: str) -> Iterator[dict[str, Any]]:
    """Stream the rows of a lab split; the lab is imported only when rows of it are asked for."""
    rows: Iterator[dict[str, Any]] = importlib.import_module("honeloom.lab").rows(split)
    return rows
