"""Vectors of rows from their words alone: TF-IDF, reduced by a truncated SVD. No model is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from honeloom.errors import RowsError
from honeloom.ops.noise import keyed_uniform, normal
from honeloom.types.ports import RowTable
from honeloom.types.rows import Row

__all__ = ["tfidf_vectors"]

Vectors = npt.NDArray[np.float32]
SAMPLE = 20_000
"""Rows that the words and the directions are learned from."""
WORDS = 50_000
"""Words that are kept, the most frequent ones of the sample."""
LENGTH = 20_000
"""Characters of a row that are read, so that a block of long rows fits in memory."""
BLOCK = 2048
_SPARE, _PASSES = 10, 4


def tfidf_vectors(rows: RowTable, *, size: int, seed: int) -> Iterator[Vectors]:
    """Yield the vectors of all rows in order, some thousand at a time.

    A row is the text of its prompt and response. The weight of a word is (1 + ln count) x idf,
    scaled to length 1 (the default of scikit-learn but for the logarithm). The directions are
    the leading right singular vectors of the sample's matrix. What is learned follows from the
    ids and the seed, not from the order of the rows.

    Parameters
    ----------
    rows : RowTable
        Iterated twice.
    size : int
        Length of a vector; fewer if the sample has fewer rows or words.
    seed : int
        Of the sample of at most 20,000 rows, and of the SVD.

    Yields
    ------
    array (n, size)
        NaN for a row without a known word.

    Raises
    ------
    RowsError
        No row of the sample has a word.

    References
    ----------
    Deerwester et al. 1990 (latent semantic analysis); the SVD is by random projection,
    Halko et al. 2011, arXiv:0909.4061.
    """
    texts = _sample(rows, seed)
    words = TfidfVectorizer(sublinear_tf=True, max_features=WORDS, dtype=np.float32, token_pattern=r"(?u)\b\w+\b")
    analyse = words.build_analyzer()
    if not any(analyse(text) for text in texts):
        raise RowsError(f"tfidf: none of {len(texts)} rows has a word; use another embedding")
    directions = _directions(words.fit_transform(texts), size, seed)
    del texts
    stream = iter(rows)
    while block := [_text(row) for row in islice(stream, BLOCK)]:
        weights = words.transform(block)
        vectors: Vectors = weights @ directions
        vectors[np.diff(weights.indptr) == 0] = np.nan
        yield vectors


def _text(row: Row) -> str:
    return f"{row.prompt}\n{row.response}"[:LENGTH]


def _sample(rows: RowTable, seed: int) -> list[str]:
    """Texts of a sample drawn by id, in the order of the draws."""
    draws = keyed_uniform(seed, "tfidf/sample", rows.ids)
    chosen = np.argsort(draws, kind="stable")[:SAMPLE]
    place = {i: p for p, i in enumerate(chosen.tolist())}
    texts = [""] * len(chosen)
    for i, row in enumerate(rows):
        if i in place:
            texts[place[i]] = _text(row)
    return texts


def _directions(matrix: csr_matrix, size: int, seed: int) -> Vectors:
    """Leading right singular vectors, (words, size): a random range, improved by power iterations."""
    turned = matrix.T.tocsr()
    count = min(size, *matrix.shape)
    wide = min(count + _SPARE, *matrix.shape)
    start = normal(seed, "tfidf/svd", turned.shape[0] * wide).numpy().reshape(turned.shape[0], wide)
    basis = _orthonormal(matrix @ start)
    for _ in range(_PASSES):
        basis = _orthonormal(matrix @ _orthonormal(turned @ basis))
    _, _, right = np.linalg.svd((turned @ basis).T, full_matrices=False)
    return np.ascontiguousarray(right[:count].T, dtype=np.float32)


def _orthonormal(columns: Iterable[Vectors]) -> Vectors:
    return np.linalg.qr(columns)[0]  # type: ignore[call-overload, no-any-return]
