"""Exact selection by size in a tensor of any length: two passes as a rule, in a few megabytes.

The first pass counts the sizes by bin; the next copies the few that share a bin with the one sought, or, if they are
many, counts them by finer bins. Sizes are compared by the bits of the float64, which are in the order of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from honeloom.merging.engine.operands import Operands, float64_operands, kernels, operands
from honeloom.merging.engine.tensors import BLOCK, Cut, Read, Tensors, blocks

__all__ = ["BINS", "FIRST", "SHIFT", "largest", "largest_each", "order_statistics"]

BINS, SHIFT = 1 << 15, 44
"""Bins of the first pass: 256 to a power of two."""
FIRST = (1023 - 64) << 52
"""Bits of 2**-64, where bin 2 begins; bin 0 has 0 alone, 1 what is below bin 2, and the last all from 2**64 on."""
_TOP, _INFINITY = (1 << 63) - 1, 0x7FF << 52
_ROOM = 1 << 18
_PIECE = 16 * BLOCK
_KEPT = 16
"""Cuts of one task vector that are kept for another merge, the newest."""

Pass = Callable[[], Iterable[tuple[int, Operands]]]


@dataclass(slots=True)
class _Search:
    """One size sought: the rank-th largest of a model, known to be among `inside` of low <= bits <= high."""

    model: int
    rank: int
    low: int = 0
    high: int = _TOP
    inside: int = 0
    place: int = -1
    done: bool = False

    def narrow(self, counts: npt.NDArray[np.int64], ends: Callable[[int], tuple[int, int]]) -> None:
        """Keep the bin that has the size; the rank is then one within it."""
        above = np.cumsum(counts[::-1])
        step = int(np.searchsorted(above, self.rank))
        at = len(counts) - 1 - step
        self.rank -= int(above[step] - counts[at])
        self.inside, (self.low, self.high) = int(counts[at]), ends(at)

    @property
    def value(self) -> float:
        """The size, when done."""
        return float(np.int64(self.low).view(np.float64))


def largest(read: Read, count: int, k: int) -> Cut:
    """Choose the k entries of largest size; of equal ones those of lowest index, so that exactly k are chosen.

    Parameters
    ----------
    read : Read
        Entries, or their sizes; their signs do not count.
    count : int
        How many there are.
    k : int
        0 or less chooses none, `count` or more all.

    Returns
    -------
    Cut
        The choice. NaN is larger than all: where it alone makes up k, all NaN are chosen and nothing else.
    """
    searches = [_Search(0, k)] if 0 < k < count else []
    _run(partial(_read_pieces, read, count), 1, searches, places=True)
    return _cut(k, count, searches)


def largest_each(tensors: Tensors, counts: Sequence[Sequence[int]]) -> tuple[tuple[Cut, ...], ...]:
    """`largest` in the task vectors of several models, which share each pass.

    Parameters
    ----------
    tensors : Tensors
        K models and their base.
    counts : sequence of sequence of int
        For each model, any number of k.

    Returns
    -------
    tuple of tuple of Cut
        A cut for each k.

    Raises
    ------
    ConfigError
        There is no base.
    """
    origin, count = tensors.origin, tensors.count
    known = tensors.cuts or tuple[dict[int, Cut], ...]({} for _ in tensors.models)
    searches = [
        _Search(m, k) for m, ks in enumerate(counts) for k in dict.fromkeys(ks) if 0 < k < count and k not in known[m]
    ]
    wanted = {(search.model, search.rank): [search] for search in searches}

    def passes() -> Iterable[tuple[int, Operands]]:
        for start, stop in blocks(count, _PIECE):
            yield from operands(tensors, start, stop, origin)

    _run(passes, len(tensors.models), searches, places=True)
    found = tuple(
        tuple(known[m].get(k) or _cut(k, count, wanted.get((m, k), [])) for k in ks) for m, ks in enumerate(counts)
    )
    for cuts, ks, new in zip(known, counts, found, strict=True):
        cuts.update(zip(ks, new, strict=True))
        while len(cuts) > _KEPT:
            del cuts[next(iter(cuts))]
    return found


def order_statistics(read: Read, count: int, ranks: Sequence[int]) -> list[float]:
    """Numbers by their place in ascending order.

    Parameters
    ----------
    read : Read
        Numbers of 0 or more; NaN is larger than all.
    count : int
        How many there are.
    ranks : sequence of int
        0 is the smallest, count - 1 the largest.

    Returns
    -------
    list of float
        One for each rank.
    """
    wrong = [rank for rank in ranks if not 0 <= rank < count]
    if wrong:
        raise ValueError(f"rank {wrong[0]} of {count} numbers; the ranks are 0 to {count - 1}")
    searches = {rank: _Search(0, count - rank) for rank in ranks}
    _run(partial(_read_pieces, _not_negative(read), count), 1, list(searches.values()), places=False)
    return [searches[rank].value for rank in ranks]


def _not_negative(read: Read) -> Read:
    def checked(start: int, stop: int) -> torch.Tensor:
        values = read(start, stop)
        if bool((values < 0).any()):
            raise ValueError(f"a number below 0 among elements {start} to {stop}; order statistics are of sizes")
        return values

    return checked


def _read_pieces(read: Read, count: int) -> Iterable[tuple[int, Operands]]:
    for start, stop in blocks(count):
        yield start, float64_operands(read(start, stop))


def _cut(k: int, count: int, searches: Sequence[_Search]) -> Cut:
    if not searches:
        return Cut(math.inf if k <= 0 else -1.0)
    found = searches[0]
    return Cut(math.inf) if found.low > _INFINITY else Cut(found.value, found.place)


def _run(passes: Pass, models: int, searches: Sequence[_Search], *, places: bool) -> None:
    """Passes until every search is done."""
    if not searches:
        return
    _first_pass(passes, models, searches)
    while True:
        for search in searches:
            exact = search.low == search.high and (search.place >= 0 or not places)
            search.done = exact or search.low > _INFINITY
        active = [search for search in searches if not search.done]
        if not active:
            return
        _pass(passes, active)


def _first_pass(passes: Pass, models: int, searches: Sequence[_Search]) -> None:
    counts, zeros = np.zeros((models, 4, BINS), np.uint32), np.zeros(models, np.int64)
    for _, part in passes():
        kernels("select_kernels").histograms(*part.arguments, counts, zeros)
    for search in searches:
        bins = counts[search.model].sum(axis=0, dtype=np.int64)
        bins[0] = zeros[search.model]
        bins[1] -= bins[0]
        search.narrow(bins, _bin_ends)


def _bin_ends(at: int) -> tuple[int, int]:
    """Smallest and largest bits of a bin of the first pass."""
    low = FIRST + (at - 2 << SHIFT)
    return (
        (0, 0) if at == 0 else (1, FIRST - 1) if at == 1 else (low, _TOP if at == BINS - 1 else low + (1 << SHIFT) - 1)
    )


def _pass(passes: Pass, active: Sequence[_Search]) -> None:
    """One more pass for all; it ends early if only places of equal sizes are sought, and found."""
    steps: list[_Seek | _Collect | _Refine] = []
    for search in active:
        kind = _Seek if search.low == search.high else _Collect if search.inside <= _ROOM else _Refine
        steps.append(kind(search))
    for first, part in passes():
        for step in steps:
            step.take(first, part)
        if all(isinstance(step, _Seek) and step.search.place >= 0 for step in steps):
            return
    for step in steps:
        step.finish()


class _Seek:
    """The place of the rank-th entry of a known size, the first in order of index."""

    def __init__(self, search: _Search) -> None:
        self.search = search

    def take(self, first: int, part: Operands) -> None:
        search = self.search
        if search.place < 0:
            seek = kernels("select_kernels").seek
            place, met = seek(*part.arguments, search.model, search.low, search.rank)
            search.rank -= met
            search.place = first + place if place >= 0 else -1

    def finish(self) -> None:
        """All is known already."""


class _Collect:
    """All entries of a bin, in order of index; then the rank-th by size."""

    def __init__(self, search: _Search) -> None:
        self.search, self.filled = search, 0
        self.sizes, self.places = np.empty(search.inside, np.int64), np.empty(search.inside, np.int64)

    def take(self, first: int, part: Operands) -> None:
        search = self.search
        self.filled = kernels("select_kernels").collect(
            *part.arguments, search.model, search.low, search.high, first, self.filled, self.sizes, self.places
        )

    def finish(self) -> None:
        at = np.argsort(-self.sizes, kind="stable")[self.search.rank - 1]
        self.search.low = self.search.high = int(self.sizes[at])
        self.search.place = int(self.places[at])


class _Refine:
    """Finer bins within a bin, and what is met in each."""

    def __init__(self, search: _Search) -> None:
        self.search = search
        self.shift = max(0, (search.high - search.low).bit_length() - 15)
        self.counts = np.zeros(BINS, np.int64)
        self.ends = np.tile(np.array([_TOP, 0], np.int64), (BINS, 1))

    def take(self, first: int, part: Operands) -> None:
        search = self.search
        kernels("select_kernels").refine(
            *part.arguments, search.model, search.low, search.high, self.shift, self.counts, self.ends
        )

    def finish(self) -> None:
        self.search.narrow(self.counts, lambda at: (int(self.ends[at, 0]), int(self.ends[at, 1])))
