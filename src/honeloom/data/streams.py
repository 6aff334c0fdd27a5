"""Row files as byte streams: decompressed, bounded, and with every fault named after its file."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

from honeloom.data import optional
from honeloom.errors import SourceError

__all__ = ["MAX_RECORD_BYTES", "Compression", "chunks", "lines", "open_bytes"]

Compression = Literal["", "gz", "zst"]

# One row may not take the memory of the whole file, should newlines be missing.
MAX_RECORD_BYTES = 1 << 28
_BUFFER = 1 << 18


@contextmanager
def open_bytes(path: Path, compression: Compression, label: str) -> Iterator[BinaryIO]:
    """Open a file for reading its unpacked bytes.

    Raises
    ------
    SourceError
        If the file cannot be opened or read, or its compressed data is damaged or cut short.
    """
    try:
        with path.open("rb") as raw:
            if compression == "gz":
                yield cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER))
            elif compression == "zst":
                yield cast(BinaryIO, io.BufferedReader(optional.load("zstd").ZstdReader(raw), _BUFFER))
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(label, compression, error) from error
    except OSError as error:
        raise SourceError(f"cannot read {label}: {error.strerror or error}") from error
    except Exception as error:
        if compression == "zst" and isinstance(error, optional.load("zstd").ZstdError):
            raise _damaged(label, compression, error) from error
        raise


def lines(path: Path, compression: Compression, label: str) -> Iterator[tuple[int, bytes]]:
    r"""Yield (1-based number, bytes up to and with the newline) of every line; a UTF-8 BOM is dropped.

    A line longer than `MAX_RECORD_BYTES` is cut to that many bytes plus one, so that its length
    tells, and the rest of it is skipped. Only "\n" ends a line.
    """
    with open_bytes(path, compression, label) as stream:
        number = 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if number == 1:
                line = _without_bom(line, label)
            yield number, line
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                _skip_line(stream)


def chunks(path: Path, compression: Compression, label: str) -> Iterator[bytes]:
    """Yield the unpacked bytes in pieces of up to 256 KiB; a UTF-8 BOM is dropped."""
    with open_bytes(path, compression, label) as stream:
        first = True
        while piece := stream.read(_BUFFER):
            yield _without_bom(piece, label) if first else piece
            first = False


def _without_bom(data: bytes, label: str) -> bytes:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"{label} is UTF-16; rows are read as UTF-8: convert the file and try again")
    return data.removeprefix(codecs.BOM_UTF8)


def _skip_line(stream: BinaryIO) -> None:
    while (rest := stream.readline(_BUFFER)) and not rest.endswith(b"\n"):
        continue


def _damaged(label: str, compression: str, error: Exception) -> SourceError:
    return SourceError(
        f"{label} is damaged or cut short ({compression} data: {error}); fetch or compress the file again"
    )
