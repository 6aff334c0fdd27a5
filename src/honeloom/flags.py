"""Flags by the name that the command line and Python share, and where each stands in the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from honeloom.errors import ConfigError

__all__ = ["FLAGS", "place_flags"]

# fmt: off
FLAGS: dict[str, dict[str, str]] = {
    "select": {
        "method": "method.type", "axis": "method.axis", "band": "method.band", "rounds": "method.rounds",
    },
    "tune": {"method": "method.type", "rank": "method.rank", "optimizer": "optimizer.type"},
    "aggregate": {"method": "method.type", "rank": "method.rank", "energy": "method.energy"},
    "glue": {"search": "search.type", "method": "method.type", "threshold": "cluster.threshold"},
    "drop": {"metric": "metric.type"},
}
# fmt: on
"""Verb -> flag -> path in its settings, for the flags that are no setting of the same name."""


def place_flags(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from flags: {"method": "lora", "rank": 8} is {"method": {"type": "lora", "rank": 8}}.

    None means that a flag was not given. A method may also be given with its settings, as a
    mapping; flags of their own win over it.
    """
    paths = FLAGS.get(verb, {})
    result = {k: v for k, v in given.items() if v is not None and k not in paths}
    for flag, path in paths.items():
        value = given.get(flag)
        if value is None:
            continue
        head, _, tail = path.partition(".")
        if flag == head and not isinstance(value, str):
            result[head] = dict(value) if isinstance(value, Mapping) else value
            continue
        node = result.setdefault(head, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{flag} cannot be added to {head}={node!r}; give {head} as a name or a mapping")
        node[tail] = value
    return result
