"""DSIR: rows resampled so that their words and pairs of words follow the target's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from zlib import crc32

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError
from honeloom.ops.noise import keyed_uniform
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData
from honeloom.types.rows import Row

__all__ = ["dsir", "gumbel", "log_ratios"]

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
_WORD = re.compile(r"\w+|[^\w\s]+")
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def dsir(data: SelectionData, *, buckets: int = 10_000, noise: bool = True) -> Scores:
    """Score a row by the log of how much likelier its n-grams are in the target than in the rows.

    Words and pairs of neighbouring words are counted in hash buckets. The log weight of a row
    is the sum over its n-grams of log p_target - log p_rows, times min(1, mean / own number of
    n-grams): a row longer than the mean of the rows counts as if it had the mean length, so
    that length alone earns nothing, and a shorter one keeps the plain sum of the paper (whose
    texts are cut to one length), as fewer words are less evidence. With `noise`, a Gumbel
    number by row id is added; the best k are then a draw of k rows without replacement in
    proportion to their weights.

    p_target is smoothed by as many n-grams as there are buckets, spread as in the rows: what
    the target does not show counts a little against a row, however rare it is, and a target
    equal to the rows gives weights of exactly zero. Several targets count as one, in
    proportion to their n-grams. The rows and the target are streamed, the rows twice; beside
    one number per row, memory is O(buckets).

    Parameters
    ----------
    data : SelectionData
        With a target.
    buckets : int
        Hash buckets.
    noise : bool
        Resample rather than take the largest weights.

    Returns
    -------
    Scores
        Natural logarithms; column `log_weight` is the score without noise and `ngrams` the
        number of words and pairs. A row without any word is -inf.

    Raises
    ------
    ConfigError
        There is no target, or no word in it.

    References
    ----------
    Xie et al. 2023, arXiv:2302.03169.
    """
    if data.target is None:
        raise ConfigError("dsir needs a target (--target ROWS): rows like those the model is wanted for")
    target, _ = _count(data.target, buckets)
    if not target.sum():
        raise ConfigError(f"dsir: none of the {len(data.target)} rows of the target has a word; give another target")
    pool, mean = _count(data.rows, buckets)
    ratios = log_ratios(target, pool)
    weights, counts = np.full(len(data.rows), -math.inf), np.zeros(len(data.rows), dtype=np.int64)
    for i, row in enumerate(data.rows):
        found = _ngrams(row, buckets)
        counts[i] = len(found)
        if len(found):
            weights[i] = ratios[found].sum() * min(1.0, mean / len(found))
    values = weights + gumbel(data.seed, data.rows.ids) if noise else weights
    columns = {"log_weight": weights.tolist(), "ngrams": counts.tolist()}
    return Scores(tuple(values.tolist()), higher_is_better=True, method="dsir", columns=columns)


def log_ratios(target: Counts, pool: Counts) -> Values:
    """Log p_target - log p_pool of every bucket, from counts (buckets,); 0 where the pool has none."""
    ratios = np.ones(len(pool))
    held, prior = pool > 0, float(len(pool))
    ratios[held] = (target[held] * float(pool.sum()) / pool[held] + prior) / (float(target.sum()) + prior)
    logs: Values = np.log(ratios)
    return logs


def gumbel(seed: int, ids: Iterable[str]) -> Values:
    """Gumbel numbers by row id: adding them to log weights and sorting draws without replacement."""
    draws = keyed_uniform(seed, "dsir/gumbel", list(ids)) + 2.0**-54  # never 0
    numbers: Values = -np.log(-np.log(draws))
    return numbers


def _count(rows: Iterable[Row], buckets: int) -> tuple[Counts, float]:
    """N-grams of every bucket, and their mean number per row."""
    counts, read = np.zeros(buckets, dtype=np.int64), 0
    for row in rows:
        read += 1
        np.add.at(counts, _ngrams(row, buckets), 1)
    return counts, counts.sum() / max(1, read)


def _ngrams(row: Row, buckets: int) -> npt.NDArray[np.int64]:
    """Bucket of every word and of every pair of words; the same on every machine."""
    words = _WORD.findall(f"{row.prompt}\n{row.response}".lower())
    single = np.fromiter((crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    pairs = (single[:-1] * _FIRST + single[1:] * _SECOND) >> np.uint64(32)
    return (np.concatenate((single, pairs)) % np.uint64(buckets)).astype(np.int64)
