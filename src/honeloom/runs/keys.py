"""Keys: what a result was made of, in 16 hex digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from honeloom.runs.atomic import canonical_json

__all__ = ["combine_digests", "stage_key"]


def stage_key(verb: str, version: int, config: Mapping[str, Any], fingerprints: Sequence[str]) -> str:
    """Key of a stage: verb, method version, resolved config and input fingerprints in order.

    The config must not contain the inputs' paths: the same content elsewhere is the same work.
    """
    blob = canonical_json([verb, version, config, list(fingerprints)])
    return hashlib.sha256(blob.encode()).hexdigest()[:16]


def combine_digests(digests: Mapping[str, str]) -> str:
    """Fingerprint of a folder: SHA-256 over its sorted "name digest" lines."""
    text = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()
