"""SHED re-created from its description, to compare with: the paper's estimator and what its release computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from honeloom.ops.noise import permutation

FloatArray = npt.NDArray[np.float64]


def shed(
    utility: Callable[[frozenset[int], int], float], n: int, group: int, iterations: int, seed: int, *, release: bool
) -> Iterator[tuple[int, FloatArray]]:
    """Yield (evaluations, values) after every permutation.

    All players are removed group by group; a group's loss is shared among its members. The paper divides
    by the group size and averages over permutations, and the last group loses v - v(empty). The release takes
    v(empty) for zero, sums, and leaves the first permutation out; none of the factors changes a rank.
    """
    total = np.zeros(n)
    empty = 0.0 if release else utility(frozenset(), 0)
    evaluations = 0 if release else 1
    for iteration in range(iterations):
        order = permutation(seed, f"shed/{iteration}", n).numpy()
        before = utility(frozenset(range(n)), iteration)
        evaluations += 1
        for start in range(0, n, group):
            rest = frozenset(order[start + group :].tolist())
            after = utility(rest, 0) if rest else empty
            evaluations += bool(rest)
            members = order[start : start + group]
            if not release:
                total[members] += (before - after) / len(members)
            elif iteration > 0:
                total[members] += before - after
            before = after
        yield evaluations, total if release else total / (iteration + 1)
