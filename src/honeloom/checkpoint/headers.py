"""Safetensors headers, checked completely before anything is allocated for their content.

The layout: 8 bytes with the header's length N (little endian), N bytes of JSON that map names to
{"dtype", "shape", "data_offsets"}, then the data. A header is read entry by entry with every length
bounded, so a hostile one costs little memory and ends in one clear sentence.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honeloom.errors import CheckpointError

__all__ = ["DTYPE_BITS", "Header", "TensorInfo", "inspect_weights", "parse_header", "read_header"]

MAX_HEADER_BYTES = 100_000_000
MAX_ENTRY_BYTES = 1 << 16
MAX_METADATA_BYTES = 1 << 22
MAX_TENSORS = 200_000
MAX_INT = (1 << 63) - 1

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element of every dtype the format knows."""

_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_SPACE = rb"[ \t\r\n]*+"
_NAME = re.compile(_SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE)
_ENTRY = re.compile(rb"\{[^{}]*+\}")
_PAIR = _STRING + _SPACE + rb":" + _SPACE + _STRING + _SPACE
_METADATA = re.compile(rb"\{" + _SPACE + rb"(?:" + _PAIR + rb"(?:," + _SPACE + _PAIR + rb")*+)?\}")
_NEXT = re.compile(_SPACE + rb"([,}])")
_OPEN = re.compile(_SPACE + rb"\{")
_EMPTY = re.compile(_SPACE + rb"\}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: name, dtype as in the header ("BF16"), shape, and byte range within the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """A sound header: tensors in the order of their data, metadata, and where the data begins in the file."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


class _Unsound(Exception):
    """Why a file is refused, in one line."""


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; reads none of its data.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Header
        Its byte ranges are contiguous, within the file, and fit dtypes and shapes.

    Raises
    ------
    CheckpointError
        The file cannot be read, is truncated, or breaks a rule of the format.
    """
    try:
        return _read(path)
    except _Unsound as reason:
        raise CheckpointError(f"{path}: {reason}; download or write the file again") from None


def parse_header(data: bytes, *, what: str) -> Header:
    """Check the header of a whole safetensors document in memory; `what` is named if it is unsound.

    Raises
    ------
    CheckpointError
        As of `read_header`.
    """
    try:
        length = _header_length(data[:8], len(data))
        tensors, metadata = _parse(data[: 8 + length])
        _check_ranges(tensors, len(data) - 8 - length)
    except _Unsound as reason:
        raise CheckpointError(f"{what}: {reason}") from None
    return Header(tuple(tensors), metadata, 8 + length)


def inspect_weights(path: Path) -> str | None:
    """Return None if a safetensors file's header is sound and its length fits, else the reason in one line."""
    try:
        _read(path)
    except _Unsound as reason:
        return str(reason)
    return None


def _read(path: Path) -> Header:
    try:
        if not path.is_file():
            raise _Unsound("no such file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = _header_length(file.read(8), size)
            with mmap.mmap(file.fileno(), 8 + length, access=mmap.ACCESS_READ) as data:
                tensors, metadata = _parse(data)
    except OSError as error:
        raise _Unsound(f"cannot be read: {error.strerror}") from None
    _check_ranges(tensors, size - 8 - length)
    return Header(tuple(tensors), metadata, 8 + length)


def _header_length(prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _Unsound(f"{size} bytes; a safetensors file begins with an 8-byte header length")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _Unsound(f"header length {length:,} is over the limit of {MAX_HEADER_BYTES:,} bytes")
    if length > size - 8:
        raise _Unsound(f"header length {length:,} is beyond the end of the file ({size:,} bytes); truncated")
    if length < 2:
        raise _Unsound(f"header length {length} is too short for JSON")
    return length


def _parse(data: mmap.mmap | bytes) -> tuple[list[TensorInfo], dict[str, str]]:
    tensors: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    seen: set[str] = set()
    for name, value in _entries(data):
        if name in seen:
            raise _Unsound(f"duplicate key {_show(name)} in the header")
        seen.add(name)
        if name == "__metadata__":
            metadata = value
            continue
        if len(tensors) >= MAX_TENSORS:
            raise _Unsound(f"more than {MAX_TENSORS:,} tensors")
        tensors.append(_tensor(name, value))
    tensors.sort(key=lambda t: (t.start, t.end))
    return tensors, metadata


def _entries(data: mmap.mmap | bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and values of the header's object, one at a time."""
    opening = _OPEN.match(data, 8)
    if not opening:
        raise _Unsound("the header is not a JSON object")
    position = opening.end()
    closing = _EMPTY.match(data, position)
    while not closing:
        key = _NAME.match(data, position, position + MAX_ENTRY_BYTES)
        if not key:
            raise _Unsound(f"header byte {position - 8}: expected a name of at most {MAX_ENTRY_BYTES:,} bytes and ':'")
        name = _json(key[1])
        pattern, limit = (_METADATA, MAX_METADATA_BYTES) if name == "__metadata__" else (_ENTRY, MAX_ENTRY_BYTES)
        value = pattern.match(data, key.end(), key.end() + limit)
        if not value:
            raise _Unsound(f"{_show(name)}: expected a flat JSON object of at most {limit:,} bytes")
        yield name, _json(value[0])
        following = _NEXT.match(data, value.end())
        if not following:
            raise _Unsound(f"header byte {value.end() - 8}: expected ',' or '}}'")
        position = following.end()
        closing = following if following[1] == b"}" else None
    if data[closing.end() :].strip(b" \t\r\n\x00"):
        raise _Unsound("text after the header's JSON object")


def _json(text: bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Unsound(f"the header is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _Unsound("duplicate key within one entry of the header")
    return result


def _tensor(name: str, value: dict[str, Any]) -> TensorInfo:
    if value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Unsound(f"{_show(name)}: keys must be dtype, shape and data_offsets, found {_show(', '.join(value))}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Unsound(f"{_show(name)}: unknown dtype {_show(dtype)}; known: {', '.join(DTYPE_BITS)}")
    if not _sizes(shape):
        raise _Unsound(f"{_show(name)}: shape {_show(shape)} must be a list of integers from 0 to 2**63 - 1")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Unsound(f"{_show(name)}: data_offsets {_show(offsets)} must be two integers, the first not larger")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > MAX_INT:
            raise _Unsound(f"{_show(name)}: shape {_show(shape)} overflows 64 bits")
    start, end = offsets
    if bits != 8 * (end - start):
        raise _Unsound(
            f"{_show(name)}: {dtype} {_show(shape)} takes {bits / 8:,.0f} bytes, data_offsets span {end - start:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), start, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_INT for v in value)


def _check_ranges(tensors: list[TensorInfo], size: int) -> None:
    """Byte ranges, in order, must cover the data exactly: no overlap, no hole, no rest."""
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise _Unsound(
                f"{_show(tensor.name)}: begins at byte {tensor.start:,} of the data and {what} ({position:,})"
            )
        position = tensor.end
    if position != size:
        what = "truncated" if position > size else "with bytes that belong to no tensor"
        raise _Unsound(f"the tensors take {position:,} bytes and the file holds {size:,}; {what}")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
