"""Keeping secrets out of logs, reports and error messages."""

from __future__ import annotations

import os
import re

__all__ = ["redact"]

_TOKEN_SHAPES = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,})")
_SECRET_NAME = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD)", re.IGNORECASE)


def redact(text: str) -> str:
    """Blank access tokens: the values of secret-looking environment variables, and known shapes."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, "[secret]")
    return _TOKEN_SHAPES.sub("[secret]", text)
