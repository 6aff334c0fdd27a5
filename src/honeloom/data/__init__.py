"""The row layer: from files of any usual format to streams of rows, and back without a changed byte.

`resolve_sources` finds files, `read_rows` streams them, `RowSet` remembers which rows can be used,
`write_selected` copies a choice of them. Nothing here holds all texts in memory, and no model
library is imported; pyarrow only where a table is read or written.
"""

from honeloom.data.overlap import overlap, question_digest, question_digests
from honeloom.data.reader import read_rows
from honeloom.data.rowset import RowCounts, RowSet
from honeloom.data.sources import RowFile, fingerprint, resolve_sources
from honeloom.data.writer import convert_rows, write_rejected, write_selected

__all__ = [
    "RowCounts",
    "RowFile",
    "RowSet",
    "convert_rows",
    "fingerprint",
    "overlap",
    "question_digest",
    "question_digests",
    "read_rows",
    "resolve_sources",
    "write_rejected",
    "write_selected",
]
