"""YAML in, plain data out, safely: YAML 1.2, no tags, no duplicate keys, bounded size."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from honeloom.errors import ConfigError

__all__ = ["apply_overrides", "dump_yaml", "load_documents", "load_yaml", "parse_scalar", "read_yaml", "set_value"]

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
_LOST = re.compile("[\x85\u2028\u2029\ufeff]")  # line breaks and marks that YAML readers fold when not escaped


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping.

    Raises
    ------
    ConfigError
        Not there, larger than 1 MiB, not YAML, a duplicate key, an unknown tag, more than
        100,000 nodes once its aliases are expanded, or not a mapping.
    """
    return read_yaml(_text(path), what=str(path))


def load_documents(path: Path) -> list[dict[str, Any]]:
    """Read a YAML file of one or more documents, each a mapping; errors as of `load_yaml`."""
    documents = [d for d in _parse(_text(path), str(path), several=True) if d is not None]
    if not documents:
        raise ConfigError(f"{path}: holds nothing")
    return [_mapping(document, str(path)) for document in documents]


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes; a configuration may have at most {MAX_BYTES:,}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{str(path)!r}: cannot be read: {error}") from None


def read_yaml(text: str, *, what: str) -> dict[str, Any]:
    """Parse YAML text whose top is a mapping; `what` names it in messages."""
    return _mapping(_parse(text, what), what)


def _mapping(document: Any, what: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ConfigError(f"{what}: the top must be a mapping of keys to values, found {type(document).__name__}")
    _count(document, what)
    return dict(document)


def _parse(text: str, what: str, *, several: bool = False) -> Any:
    try:
        yaml = YAML(typ="safe", pure=True)
        return list(yaml.load_all(text)) if several else yaml.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        parts = [p for p in (getattr(error, "context", None), getattr(error, "problem", None)) if p]
        raise ConfigError(f"{what}{where}: {', '.join(parts) or str(error).splitlines()[0]}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: not readable as YAML: {error}") from None


def _count(document: Any, what: str) -> None:
    """Refuse documents whose aliases expand beyond MAX_NODES, without expanding them."""
    left = MAX_NODES
    stack = [document]
    while stack:
        node = stack.pop()
        left -= 1
        if left < 0:
            raise ConfigError(f"{what}: more than {MAX_NODES:,} nodes once its aliases are expanded")
        if isinstance(node, dict):
            bad = next((k for k in node if not isinstance(k, str)), None)
            if bad is not None:
                raise ConfigError(f"{what}: key {bad!r} is a {type(bad).__name__}; write it in quotes")
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def parse_scalar(text: str) -> Any:
    """Read the right side of `--set a=b` as YAML ("10%" is text, "3" a number, "[1, 2]" a list)."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        return text


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `data` with every "a.b=c" applied; list items are addressed by number.

    Raises
    ------
    ConfigError
        No "=", or a part of the path goes through a value that has no parts.
    """
    result: dict[str, Any] = _copy(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override!r}: expected KEY=VALUE, for example --set method.type=length")
        _assign(result, path.split("."), parse_scalar(text), f"--set {override!r}")
    return result


def set_value(data: Mapping[str, Any], path: str, value: Any, what: str) -> dict[str, Any]:
    """Return `data` with one value at "a.b" set; ConfigError, which begins with `what`, as of `apply_overrides`."""
    result: dict[str, Any] = _copy(data)
    _assign(result, path.split("."), value, what)
    return result


def _assign(node: Any, parts: list[str], value: Any, what: str) -> None:
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{what}: {part!r} is not an index below {len(node)}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise ConfigError(f"{what}: {'.'.join(parts[:depth])!r} is {node!r} and has no parts")
        if last:
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(v) for v in value]
    return value


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in the given order."""
    text = _dump(data, readable=True)
    return text if not _LOST.search(text) else _dump(data, readable=False)


def _dump(data: Any, *, readable: bool) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_unicode = readable
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1 << 30  # never fold: a folded key is not read back
    buffer = io.StringIO()
    yaml.dump(_copy(data), buffer)
    return buffer.getvalue()
