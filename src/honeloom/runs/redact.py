"""Keeping secrets out of logs, reports and error messages."""

from __future__ import annotations

import os
import re
from typing import Any

__all__ = ["redact", "redact_tree"]

_TOKEN_SHAPES = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
_USER_INFO = re.compile(r"(\w://)[^/\s'\"<>]*@")
_SECRET_NAME = re.compile(r"(TOKEN(?!S|IZER)|API_KEY|SECRET|PASSWORD)", re.IGNORECASE)


def redact(text: str) -> str:
    """Blank access tokens: the values of secret-looking environment variables, and known shapes.

    Name and password in front of an address's host go too.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, "[secret]")
    return _USER_INFO.sub(r"\1", _TOKEN_SHAPES.sub("[secret]", text))


def redact_tree(value: Any) -> Any:
    """`redact` every text of plain data, keys included; the rest is returned as it is."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_tree(k): redact_tree(v) for k, v in value.items()}
    return [redact_tree(v) for v in value] if isinstance(value, list | tuple) else value
