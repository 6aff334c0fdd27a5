"""A weight per model and layer, learned by gradients of the loss."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.racing import Found, Race, SearchData
from honeloom.ops.noise import permutation

__all__ = ["layerwise"]

Values = npt.NDArray[np.float64]
_DECAYS = (0.9, 0.999)
_EPS = 1e-8


def layerwise(
    data: SearchData,
    *,
    steps: int = 100,
    lr: float = 0.01,
    batch: int = 16,
    checks: int = 4,
    confidence: float = 0.95,
    margin: float = 0.0,
    racing: bool = True,
) -> Found:
    """Learn weights in [0, 1] per model and layer by Adam on the loss of the rows.

    The gradient of a weight is the inner product of the loss's gradient in that layer with the model's difference from
    the origin: the base, or without one the merge itself, for then the weights are divided by their sum. The paper
    lowers the entropy of unlabelled inputs; here the loss of the answers is lowered. It begins at equal weights.

    Parameters
    ----------
    data : SearchData
        N models; the port has gradients, and one group per layer.
    steps : int
        Of Adam.
    lr : float
        Its learning rate.
    batch : int
        Rows per step, drawn without repetition until all were used.
    checks : int
        How often the weights are measured on all rows and may become the best so far.
    confidence, margin : float
        Of the paired test by which they do.
    racing : bool
        Stop such a measurement if they are worse after some of the rows.

    Returns
    -------
    Found
        The evaluations contain the steps, and the rows measured those of the batches.

    References
    ----------
    Yang et al. 2024 (AdaMerging), arXiv:2310.02575; Kingma and Ba 2015 (Adam), arXiv:1412.6980.
    """
    race = Race(data, confidence=confidence, margin=margin, racing=racing)
    models, groups = len(data.models), data.port.groups
    weights: Values = np.full((groups, models), 1 / models)
    race.challenge(Candidate.of(weights))
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    measured_at = {round((i + 1) * steps / checks) for i in range(checks)}
    for step in range(1, steps + 1):
        if race.left < 2:
            return race.found("budget")
        slope = _slope(data, race, weights, _rows(data, step - 1, batch))
        first = _DECAYS[0] * first + (1 - _DECAYS[0]) * slope
        second = _DECAYS[1] * second + (1 - _DECAYS[1]) * slope**2
        move = (first / (1 - _DECAYS[0] ** step)) / (np.sqrt(second / (1 - _DECAYS[1] ** step)) + _EPS)
        weights = np.clip(weights - lr * move, 0.0, 1.0)
        if data.averages:
            weights = Candidate.of(weights).normalised().array
        if step in measured_at:
            race.challenge(Candidate.of(weights))
    return race.found("all steps were taken")


def _rows(data: SearchData, step: int, batch: int) -> list[int]:
    """Rows of a step: consecutive ones of a new random order in every pass."""
    n = len(data.objective.codes)
    batch = min(batch, n)
    per_pass = n // batch
    order = permutation(data.seed, f"search/layerwise/{step // per_pass}", n).tolist()
    start = step % per_pass * batch
    return [int(i) for i in order[start : start + batch]]


def _slope(data: SearchData, race: Race, weights: Values, rows: list[int]) -> Values:
    """Gradient (G, N) of the objective on some rows."""
    chosen = np.array(rows, dtype=np.int64)
    factors = data.objective.factors(data.singles[0][chosen, 1], chosen)
    _, slope = data.port.gradient(Candidate.of(weights), rows, factors)
    race.count_gradient(len(rows))
    return slope
