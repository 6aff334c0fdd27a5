"""Raw records of a file, one at a time: located and decoded, but not yet understood as rows."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from honeloom.data import optional
from honeloom.data.sources import RowFile
from honeloom.data.streams import MAX_RECORD_BYTES, chunks, lines
from honeloom.errors import SourceError
from honeloom.types.rows import RejectKind

__all__ = ["Lines", "Record", "Unusable", "describe", "raw_records", "to_json"]

Lines = NDArray[np.int64]

# One record as one line, readable in any script; values that JSON lacks (dates) become strings.
to_json = json.JSONEncoder(ensure_ascii=False, separators=(", ", ": "), default=str).encode

_NAMES = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number",
          float: "a number", type(None): "null"}  # fmt: skip
# Bytes that were not UTF-8 arrive as these characters; JSON escapes cannot produce them unparsed.
_SMUGGLED = re.compile("[\udc80-\udcff]")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
# A text cut anywhere fails within this many characters of its end, unless inside a string.
_TAIL = 16


class Unusable(Exception):
    """A row cannot be used; carries the reason, and the kind that counts are kept by."""

    def __init__(self, reason: str, kind: RejectKind = "schema") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind: RejectKind = kind


def describe(value: object) -> str:
    """Name a value's JSON type for messages, as in "a list"."""
    return _NAMES.get(type(value)) or f"a {type(value).__name__}"


@dataclass(slots=True)
class Record:
    """One record: its 1-based line or ordinal, and its bytes (JSON lines), value, or fault."""

    line: int
    raw: bytes = b""
    value: dict[str, Any] | None = None
    fault: Unusable | None = None

    def load(self) -> dict[str, Any]:
        """Return the record as an object, or raise `Unusable`."""
        if self.fault is not None:
            raise self.fault
        return self.value if self.value is not None else _parse(self.raw)

    def as_line(self) -> bytes:
        """Return the record as one line of JSON; a JSON line as it stands, with a newline at its end."""
        if self.value is not None:
            return _encode(self.value) + b"\n"
        return self.raw if self.raw.endswith(b"\n") else self.raw + b"\n"


def _encode(value: dict[str, Any]) -> bytes:
    try:
        return to_json(value).encode()
    except UnicodeEncodeError:
        # A field that is not read may hold lone surrogates; as escapes they survive.
        return json.dumps(value, default=str).encode()


def raw_records(file: RowFile, wanted: Lines | None = None) -> Iterator[Record]:
    """Stream a file's records, in order.

    Parameters
    ----------
    file : RowFile
        The file.
    wanted : int64 array, optional
        Ascending line or record numbers; only these are returned, and reading stops after the last.

    Raises
    ------
    SourceError
        If the file itself cannot be read on: damaged compression, Parquet or JSON array.
    """
    if file.format in ("parquet", "arrow"):
        pairs = optional.load("tables").iter_values(file.path, file.format, file.label, wanted)
        return (Record(line, value=value) for line, value in pairs)
    readers = {"jsonl": _json_lines, "json": _json_array, "text": _text, "lab": _lab}
    records = readers[file.format](file) if file.format in readers else _delimited(file)
    return records if wanted is None else _only(records, wanted)


def _only(records: Iterator[Record], wanted: Lines) -> Iterator[Record]:
    numbers = iter(wanted.tolist())
    if (target := next(numbers, None)) is None:
        return
    for record in records:
        if record.line == target:
            yield record
            if (target := next(numbers, None)) is None:
                return


def _json_lines(file: RowFile) -> Iterator[Record]:
    for number, line in lines(file.path, file.compression, file.label):
        if len(line) > MAX_RECORD_BYTES:
            yield Record(number, fault=_too_long())
        elif line and not line.isspace():
            yield Record(number, raw=line)


def _parse(raw: bytes) -> dict[str, Any]:
    """Decode one JSON line; the reasons name the column, counted in characters from 1."""
    try:
        value = json.loads(raw.decode().rstrip())
    except UnicodeDecodeError as error:
        raise _not_utf8(raw, error) from error
    except json.JSONDecodeError as error:
        raise Unusable(
            f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}", "unreadable"
        ) from error
    except RecursionError as error:
        raise Unusable("invalid JSON: nested too deeply", "unreadable") from error
    except ValueError as error:
        raise Unusable(f"invalid JSON: {error}", "unreadable") from error
    if not isinstance(value, dict):
        raise Unusable(f"the line is {describe(value)}, expected an object", "unreadable")
    return value


def _text(file: RowFile) -> Iterator[Record]:
    for number, line in lines(file.path, file.compression, file.label):
        if not line or line.isspace():
            continue
        if len(line) > MAX_RECORD_BYTES:
            yield Record(number, fault=_too_long())
            continue
        try:
            yield Record(number, value={"text": line.decode().rstrip("\r\n")})
        except UnicodeDecodeError as error:
            yield Record(number, fault=_not_utf8(line, error))


def _lab(file: RowFile) -> Iterator[Record]:
    for number, row in enumerate(optional.lab_rows(file.split), 1):
        yield Record(number, value=row)


def _too_long() -> Unusable:
    return Unusable(f"the line is longer than {MAX_RECORD_BYTES >> 20} MiB", "unreadable")


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> Unusable:
    return Unusable(f"not UTF-8 (byte 0x{data[error.start]:02x} at byte {error.start + 1})", "unreadable")


# ------------------------------------------------------------------ CSV and TSV


def _delimited(file: RowFile) -> Iterator[Record]:
    """Read records with a header; numbered by the line each record starts on."""
    # The limit of the csv module is global and only 128 KiB: it is raised, never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    bad: dict[int, Unusable] = {}
    rows = csv.reader(_decoded(file, bad), delimiter="," if file.format == "csv" else "\t", strict=True)
    header: list[str] | None = None
    while True:
        start = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(start, fault=Unusable(f"invalid {file.format.upper()}: {error}", "unreadable"))
            continue
        if header is None:
            header = _header(file, cells)
        elif cells:
            faults = [bad.pop(n) for n in range(start, rows.line_num + 1) if n in bad] if bad else []
            yield _cells(start, header, cells, faults)


def _decoded(file: RowFile, bad: dict[int, Unusable]) -> Iterator[str]:
    for number, line in lines(file.path, file.compression, file.label):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            bad[number] = _not_utf8(line, error)
            yield line.decode(errors="replace")


def _header(file: RowFile, cells: list[str]) -> list[str]:
    if len(set(cells)) < len(cells) or not all(cells):
        raise SourceError(f"{file.label}:1: the header {cells} has empty or repeated names; mend it")
    return cells


def _cells(line: int, header: list[str], cells: list[str], faults: list[Unusable]) -> Record:
    if faults:
        return Record(line, fault=faults[0])
    if len(cells) != len(header):
        reason = f"the row has {len(cells)} fields, the header {len(header)}"
        return Record(line, fault=Unusable(reason, "unreadable"))
    return Record(line, value=dict(zip(header, cells, strict=True)))


# ------------------------------------------------------------------ JSON arrays


def _json_array(file: RowFile) -> Iterator[Record]:
    """Stream the elements of one JSON array, holding one element and one piece of the file."""
    window = _Window(file)
    window.expect("[")
    number = 0
    while True:
        number += 1
        if window.peek() == "]":
            if number > 1:
                fault = Unusable("invalid JSON: trailing comma before the end of the array", "unreadable")
                yield Record(number, fault=fault)
            break
        value, smuggled = window.element(number)
        yield _element(number, value, smuggled)
        if window.peek() != ",":
            break
        window.expect(",")
    window.expect("]")
    if rest := window.peek():
        window.fail(f"{rest!r} after the end of the array")


def _element(number: int, value: object, smuggled: bool) -> Record:
    if smuggled:
        return Record(number, fault=Unusable("not UTF-8", "unreadable"))
    if not isinstance(value, dict):
        reason = f"the element is {describe(value)}, expected an object"
        return Record(number, fault=Unusable(reason, "unreadable"))
    return Record(number, value=value)


class _Window:
    """The part of a JSON text that is being parsed."""

    def __init__(self, file: RowFile) -> None:
        self._label = file.label
        self._chunks = chunks(file.path, file.compression, file.label)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False

    def peek(self) -> str:
        """Return the next character that is no space, or "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def expect(self, character: str) -> None:
        """Step over one character, which must be next."""
        found = self.peek()
        if found != character:
            self.fail(f"expected {character!r}, found {repr(found) if found else 'the end'}")
        self._at += 1

    def element(self, number: int) -> tuple[object, bool]:
        """Parse one element; tell also whether bytes in it were not UTF-8."""
        self.peek()
        wanted = 1 << 16
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # A number at the very end of the window may go on.
                if end < len(self._text) or not self._more():
                    break
            except json.JSONDecodeError as error:
                cut = error.pos + _TAIL >= len(self._text) or error.msg.startswith("Unterminated")
                if not cut or not self._grow(wanted):
                    self._at = error.pos if not cut else self._at
                    self.fail(f"element {number}: {error.msg}")
                wanted *= 2
            except (ValueError, RecursionError) as error:
                self.fail(f"element {number}: {error}")
        smuggled = _SMUGGLED.search(self._text, self._at, end) is not None
        self._at = end
        return value, smuggled

    def fail(self, what: str) -> NoReturn:
        """Raise the error that ends the reading, with the line reached."""
        line = self._line + self._text.count("\n", 0, self._at)
        raise SourceError(
            f"{self._label}:{line}: invalid JSON: {what}; an array cannot be read past a fault: "
            "mend it, or store one object per line as .jsonl"
        )

    def _grow(self, wanted: int) -> bool:
        """Read until `wanted` characters more are there; doubling keeps re-parsing linear."""
        start = len(self._text) - self._at
        while len(self._text) - self._at < start + wanted:
            if len(self._text) - self._at > MAX_RECORD_BYTES or not self._more():
                return len(self._text) - self._at > start
        return True

    def _more(self) -> bool:
        if self._ended:
            return False
        piece = next(self._chunks, b"")
        self._ended = not piece
        fresh = self._decoder.decode(piece, final=self._ended)
        self._line += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + fresh
        self._at = 0
        return bool(fresh) or not self._ended
