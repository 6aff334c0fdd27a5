"""A set of usable rows that may be larger than memory: only ids, labels and places are held."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from honeloom.data.duplicates import DuplicateFinder
from honeloom.data.reader import read_file, read_numbered
from honeloom.data.records import Lines
from honeloom.data.sources import RowFile
from honeloom.errors import ConfigError, RowsError, SourceError
from honeloom.types.rows import Rejected, Row

__all__ = ["RowCounts", "RowSet"]

_Stamp: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How many rows were read, how many can be used, and how many were rejected by kind.

    `files` gives the rows read of every file, 0 for an empty one.
    """

    rows_in: int
    rows_usable: int
    rejected: Mapping[str, int]
    files: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class RowSet:
    """The usable rows of some files, in reading order; iterating streams them from the files.

    Attributes
    ----------
    files : tuple of RowFile
        Where the rows lie.
    ids, domains, sources : list
        One entry per usable row.
    file_index : int32 array, shape (len,)
        Which of `files` holds the row.
    line : int64 array, shape (len,)
        The row's 1-based line or record number there.
    rejected : list of Rejected
        Every row that cannot be used.
    counts : RowCounts
        Of the whole scan, for views too.
    """

    files: tuple[RowFile, ...]
    ids: list[str]
    domains: list[str | None]
    sources: list[str]
    file_index: NDArray[np.int32]
    line: Lines
    rejected: list[Rejected]
    counts: RowCounts
    _stamps: tuple[_Stamp, ...] = field(repr=False)

    @classmethod
    def scan(
        cls,
        files: Sequence[RowFile],
        *,
        limit: int | None = None,
        strict: bool = False,
        max_bad: float = 0.01,
        dedup: bool = True,
        near_duplicates: float | None = None,
    ) -> RowSet:
        """Read the files once and remember which rows can be used.

        Parameters
        ----------
        files : sequence of RowFile
            From `resolve_sources`.
        limit : int, optional
            Read only the first so many rows, usable or not.
        strict : bool
            Raise at the first row that cannot be used (duplicates are no fault).
        max_bad : float
            Largest share of rows that may be unusable, duplicates of content not counted; in [0, 1].
        dedup : bool
            Reject rows with the content of an earlier row. If false, equal rows keep equal ids.
        near_duplicates : float, optional
            Reject rows with at least this Jaccard similarity to an earlier one; in (0, 1].

        Raises
        ------
        RowsError
            If too many rows, or all, are unusable.
        SourceError
            If a file cannot be read on.
        """
        _check_share("max_bad", max_bad, least_allowed=True)
        if near_duplicates is not None:
            _check_share("near_duplicates", near_duplicates, least_allowed=False)
        stamps = tuple(_stamp(file) for file in files)
        scan = _Scan(tuple(files), DuplicateFinder(exact=dedup, near=near_duplicates))
        for position, row in read_numbered(files, limit=limit):
            scan.add(position, row)
            if strict and scan.rejected and not scan.rejected[-1].is_duplicate:
                raise RowsError(f"{_say(scan.rejected[-1])}; mend it, or skip such rows without --strict")
        counts = scan.counts()
        _check_bad(files, counts, scan.rejected, max_bad)
        return scan.rowset(counts, stamps)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Row]:
        """Stream the rows again, in order.

        Raises
        ------
        SourceError
            If a file was changed since the scan.
        """
        for file, wanted in self.places():
            for row in read_file(file, wanted):
                if isinstance(row, Rejected):
                    raise _changed(file)
                yield row

    def take(self, indices: Iterable[int]) -> RowSet:
        """Return the rows at these positions, in file order whatever the order given.

        Raises
        ------
        IndexError
            If a position is outside the set.
        ValueError
            If a position is given twice.
        """
        chosen = np.sort(np.fromiter(indices, dtype=np.int64))
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < len(self):
            raise IndexError(f"positions {chosen[0]} to {chosen[-1]} given, expected 0 to {len(self) - 1}")
        if (chosen[1:] == chosen[:-1]).any():
            raise ValueError("a position is given twice; rows can be taken once")
        at = chosen.tolist()
        return RowSet(
            files=self.files,
            ids=[self.ids[i] for i in at],
            domains=[self.domains[i] for i in at],
            sources=[self.sources[i] for i in at],
            file_index=self.file_index[chosen],
            line=self.line[chosen],
            rejected=self.rejected,
            counts=self.counts,
            _stamps=self._stamps,
        )

    def places(self) -> Iterator[tuple[RowFile, Lines]]:
        """Yield each file that holds rows of this set, with their ascending line numbers."""
        for i, (file, stamp) in enumerate(zip(self.files, self._stamps, strict=True)):
            first, last = np.searchsorted(self.file_index, [i, i + 1])
            if first < last:
                if _stamp(file) != stamp:
                    raise _changed(file)
                yield file, self.line[first:last]


class _Scan:
    """What a scan has gathered so far."""

    def __init__(self, files: tuple[RowFile, ...], finder: DuplicateFinder) -> None:
        self.rejected: list[Rejected] = []
        self._files = files
        self._finder = finder
        self._ids: list[str] = []
        self._domains: list[str | None] = []
        self._sources: list[str] = []
        self._file_index = array("i")
        self._lines = array("q")
        self._read = dict.fromkeys((file.label for file in files), 0)

    def add(self, position: int, row: Row | Rejected) -> None:
        """File a row of the file at this position under the usable or the rejected ones."""
        self._read[row.where.file] += 1
        rejected = row if isinstance(row, Rejected) else self._finder.check(row)
        if rejected is not None:
            self.rejected.append(rejected)
        elif isinstance(row, Row):
            self._ids.append(row.id)
            self._domains.append(None if row.domain is None else sys.intern(row.domain))
            self._sources.append(sys.intern(row.source))
            self._file_index.append(position)
            self._lines.append(row.where.line)

    def counts(self) -> RowCounts:
        """Return the totals."""
        kinds = Counter(rejected.kind for rejected in self.rejected)
        return RowCounts(sum(self._read.values()), len(self._ids), dict(sorted(kinds.items())), self._read)

    def rowset(self, counts: RowCounts, stamps: tuple[_Stamp, ...]) -> RowSet:
        """Return the set; the texts remembered for comparison are let go."""
        return RowSet(
            files=self._files,
            ids=self._ids,
            domains=self._domains,
            sources=self._sources,
            file_index=np.array(self._file_index, dtype=np.int32),
            line=np.array(self._lines, dtype=np.int64),
            rejected=self.rejected,
            counts=counts,
            _stamps=stamps,
        )


def _check_share(name: str, value: float, *, least_allowed: bool) -> None:
    if not 0 <= value <= 1 or (value == 0 and not least_allowed):
        bounds = "from 0" if least_allowed else "above 0"
        raise ConfigError(f"{name} is {value}, expected a share {bounds} up to 1")


def _check_bad(files: Sequence[RowFile], counts: RowCounts, rejected: list[Rejected], max_bad: float) -> None:
    bad = [row for row in rejected if not row.is_duplicate]
    examples = "; ".join(_say(row) for row in (bad or rejected)[:3])
    if counts.rows_usable == 0:
        names = ", ".join(file.label for file in files[:5]) or "no files"
        why = f": {examples}" if examples else "; give a file that holds rows"
        raise RowsError(f"no usable row in {names} ({counts.rows_in} rows read){why}")
    if len(bad) > max_bad * counts.rows_in:
        raise RowsError(
            f"{len(bad)} of {counts.rows_in} rows cannot be used, more than the share of {max_bad:.4g} "
            f"that --max-bad allows: {examples}. Mend them, or raise --max-bad to skip them "
            "(--strict stops at the first)"
        )


def _say(row: Rejected) -> str:
    return f"{row.where}: {row.reason}"


def _stamp(file: RowFile) -> _Stamp:
    """Return what changes when a file does: its size and the time it was last written."""
    if file.format == "lab":
        return (0, 0)
    try:
        status = file.path.stat()
    except OSError as error:
        raise SourceError(f"cannot read {file.label}: {error.strerror}") from error
    return (status.st_size, status.st_mtime_ns)


def _changed(file: RowFile) -> SourceError:
    return SourceError(f"{file.label} was changed while it was in use; start again and leave it as it is")
