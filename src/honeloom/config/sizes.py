"""Sizes of memory as a person writes them."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["size_in_bytes"]

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def size_in_bytes(value: Any) -> Any:
    """Bytes of "2GiB", "500 MB" or a number."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", value.lower())
    if match is None:
        raise ValueError("a size is a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _SIZES[match[2] or ""])
