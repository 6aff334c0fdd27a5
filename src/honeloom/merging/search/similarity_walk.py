"""Running merge whose next model is the most or the least similar to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError
from honeloom.merging.search.coefficient import GRID, grid_walk
from honeloom.merging.search.racing import Found, Race, SearchData

__all__ = ["similarity"]

Values = npt.NDArray[np.float64]


def similarity(
    data: SearchData,
    *,
    order: Literal["ascending", "descending"] = "ascending",
    grid: Sequence[float] = GRID,
    confidence: float = 0.95,
    margin: float = 0.0,
    racing: bool = True,
) -> Found:
    """From the best single model on, merge the model next in similarity with the best coefficient of a grid.

    The similarity of the merge so far to a model is the mean of its members' similarities to that model, weighted by
    their coefficients. That is read from the matrix of the single models, without any weights of theirs; a cosine with
    the merge itself would be larger, for averaging shortens what the members do not share.

    Parameters
    ----------
    data : SearchData
        N models and their similarity matrix; at most (N - 1) times the grid's length candidates are measured.
    order : {"ascending", "descending"}
        ascending: the model least similar to the merge comes next; descending: the most similar.
    grid : sequence of float
        Coefficients of the merge so far, in (0, 1).
    confidence, margin : float
        Of the paired test by which the best of a grid is taken.
    racing : bool
        Stop candidates that are worse after some of the rows.

    Returns
    -------
    Found
        Weights that sum to 1.

    Raises
    ------
    ConfigError
        No similarity matrix, or one of another size.

    References
    ----------
    Zhao et al. 2024 (Model-GLUE), arXiv:2410.05357.
    """
    count = len(data.models)
    if data.similarity is None or data.similarity.shape != (count, count):
        found = "none was given" if data.similarity is None else f"it is {data.similarity.shape}"
        raise ConfigError(f"search method similarity needs the models' similarity matrix, {count} x {count}; {found}")
    matrix, sign = data.similarity, -1.0 if order == "descending" else 1.0

    def choose(state: Values, pool: list[int]) -> int:
        return min(pool, key=lambda k: sign * float(state @ matrix[:, k]) / float(state.sum()))

    return grid_walk(Race(data, confidence=confidence, margin=margin, racing=racing), choose, grid)
