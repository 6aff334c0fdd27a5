"""Near duplicates by MinHash over word 5-shingles, in buckets of locality-sensitive hashing."""

from __future__ import annotations

import re

from datasketch import MinHash, MinHashLSH

from honeloom.types.rows import Row

__all__ = ["NearDuplicates"]

_PERMUTATIONS = 128
_SHINGLE = 5
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """Find rows that share most of their word 5-shingles with an earlier row that was kept.

    Parameters
    ----------
    threshold : float
        Least estimated Jaccard similarity, in (0, 1]; its standard error is at most 0.045.

    Notes
    -----
    The permutations are seeded, so that equal rows in equal order give equal answers.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._lsh = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._sketches: dict[int, MinHash] = {}

    def find_or_add(self, number: int, row: Row) -> int | None:
        """Return the number of the earliest row like this one, or remember this one and return None."""
        sketch = _sketch(row)
        found = self._earliest(sketch)
        if found is None:
            self._lsh.insert(number, sketch, check_duplication=False)
            self._sketches[number] = sketch
        return found

    def find(self, row: Row) -> int | None:
        """Return the number of the earliest row like this one, or None."""
        return self._earliest(_sketch(row))

    def _earliest(self, sketch: MinHash) -> int | None:
        # Buckets only propose; the estimate decides.
        near = (n for n in sorted(self._lsh.query(sketch)) if self._sketches[n].jaccard(sketch) >= self._threshold)
        return next((int(n) for n in near), None)


def _sketch(row: Row) -> MinHash:
    sketch = MinHash(num_perm=_PERMUTATIONS, seed=0)
    sketch.update_batch([shingle.encode() for shingle in _shingles(row)])
    return sketch


def _shingles(row: Row) -> list[str]:
    words = _WORD.findall(f"{row.prompt}\n{row.response if row.kind != 'text' else ''}".lower())
    count = max(1, len(words) - _SHINGLE + 1)
    return sorted({" ".join(words[i : i + _SHINGLE]) for i in range(count)})
