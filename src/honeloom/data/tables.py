"""Parquet and Arrow rows: the only module of the row layer that imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from honeloom.data.sources import RowFile
from honeloom.errors import SourceError

__all__ = ["copy_rows", "iter_values", "same_schema", "write_values"]

Lines = NDArray[np.int64]

_BATCH = 1024
# A row group closes at either bound, so that neither long nor many rows fill the memory.
_GROUP_ROWS = 1 << 16
_GROUP_BYTES = 1 << 26


def iter_values(path: Path, form: str, label: str, wanted: Lines | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (1-based record number, record) of a file, or of its wanted (ascending) records."""
    for first, batch in _wanted_batches(path, form, label, wanted):
        yield from zip(first.tolist(), batch.to_pylist(), strict=True)


def same_schema(files: Sequence[RowFile]) -> bool:
    """Whether all are tables with equal column names and types."""
    if any(file.format not in ("parquet", "arrow") for file in files):
        return False
    schemas = []
    for file in files:
        with _reader(file.path, file.format, file.label) as (schema, _):
            schemas.append(schema)
    return all(schema.equals(schemas[0]) for schema in schemas)


def copy_rows(places: Iterable[tuple[RowFile, Lines]], first: RowFile, target: BinaryIO) -> None:
    """Write the rows at these places as Parquet with the schema and metadata of the first file."""
    with _reader(first.path, first.format, first.label) as (schema, _):
        pass
    chosen = (_wanted_batches(file.path, file.format, file.label, lines) for file, lines in places)
    _write((batch for batches in chosen for _, batch in batches), schema, target)


def write_values(values: Iterable[dict[str, Any]], columns: dict[str, str], target: BinaryIO) -> None:
    """Write records as Parquet.

    Parameters
    ----------
    values : iterable of dict
        The records; absent columns become null.
    columns : dict
        Column name to type: string, int64, turns:<role key>:<text key>, or pairs.
    target : binary file
        Open for writing.
    """
    schema = pa.schema([pa.field(name, _type(kind)) for name, kind in columns.items()])
    _write(_batched(values, schema), schema, target)


def _type(kind: str) -> pa.DataType:
    if kind == "pairs":
        return pa.list_(pa.list_(pa.string()))
    if kind.startswith("turns:"):
        _, role, text = kind.split(":")
        return pa.list_(pa.struct([(role, pa.string()), (text, pa.string())]))
    return {"string": pa.string(), "int64": pa.int64()}[kind]


def _batched(values: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    held: list[dict[str, Any]] = []
    for value in values:
        held.append(value)
        if len(held) == _BATCH:
            yield pa.RecordBatch.from_pylist(held, schema=schema)
            held = []
    if held:
        yield pa.RecordBatch.from_pylist(held, schema=schema)


def _write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, target: BinaryIO) -> None:
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        held: list[pa.RecordBatch] = []
        for batch in batches:
            held.append(batch)
            if sum(b.num_rows for b in held) >= _GROUP_ROWS or sum(b.nbytes for b in held) >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(held, schema=schema))
                held = []
        writer.write_table(pa.Table.from_batches(held, schema=schema))


def _wanted_batches(
    path: Path, form: str, label: str, wanted: Lines | None
) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
    """Yield record numbers and batches, reduced to the wanted records; batches without any are skipped."""
    start = 1
    with _reader(path, form, label) as (_, batches):
        for batch in batches:
            numbers = np.arange(start, start + batch.num_rows)
            start += batch.num_rows
            if wanted is None:
                yield numbers, batch
                continue
            low, high = np.searchsorted(wanted, [numbers[0], start]) if len(numbers) else (0, 0)
            if low < high:
                yield wanted[low:high], batch.take(pa.array(wanted[low:high] - numbers[0]))
            if high == len(wanted):
                return


@contextmanager
def _reader(path: Path, form: str, label: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Open a table; yield its schema and its record batches in order."""
    try:
        if form == "parquet":
            # Buffered, so that a row group need not be in memory as a whole.
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
                yield table.schema_arrow, table.iter_batches(_BATCH)
        else:
            with pa.OSFile(str(path)) as stream:
                yield from _ipc(stream)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{label} is no readable {form} file: {error}; fetch or write it again") from error


def _ipc(stream: pa.NativeFile) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Open both kinds of Arrow file: the file format starts with a mark, the stream format does not."""
    mark = stream.read(6)
    stream.seek(0)
    if mark == b"ARROW1":
        with pa.ipc.open_file(stream) as file:
            whole: Iterator[pa.RecordBatch] = (file.get_batch(i) for i in range(file.num_record_batches))
            yield file.schema, _sliced(whole)
    else:
        with pa.ipc.open_stream(stream) as reader:
            yield reader.schema, _sliced(reader)


def _sliced(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)
