"""Zstandard frames as a readable stream that notices a file cut short."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import zstandard

__all__ = ["ZstdError", "ZstdReader"]

ZstdError = zstandard.ZstdError

# Small, because one compressed block of a few bytes may unpack to 128 KiB.
_CHUNK = 4096


class ZstdReader(io.RawIOBase):
    """Decompress one or more frames; raise EOFError where the last frame is incomplete.

    The stream reader of the library ends silently on a truncated file, which would lose rows.
    """

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__()
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Tell `io.BufferedReader` that this stream can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` with unpacked bytes; 0 at the end of the last frame."""
        while not self._ready:
            if not self._unpack():
                return 0
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file below as well."""
        self._raw.close()
        super().close()

    def _unpack(self) -> bool:
        data = self._raw.read(_CHUNK)
        if not data:
            if self._frame is not None:
                raise EOFError("the last zstd frame is incomplete")
            return False
        parts: list[bytes] = []
        while data:
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(self._frame.decompress(data))
            data = b""
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, None
        self._ready = memoryview(b"".join(parts))
        return True
