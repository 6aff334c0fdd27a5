"""A second, plain computation of merged tensors, to check what was written against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.dtypes import FLOAT_DTYPES
from honeloom.checkpoint.reader import Checkpoint
from honeloom.merging.config import LinearConfig, SlerpConfig, TaskArithmeticConfig
from honeloom.merging.sources import ModelSource
from honeloom.merging.streaming import Merger
from honeloom.ops.noise import permutation, uniform

__all__ = ["last_place_error", "recomputation_error"]

Array = npt.NDArray[np.float64]
_WINDOW = 1 << 20
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}


def recomputation_error(merger: Merger, written: Checkpoint, *, seed: int, tensors: int = 3) -> float:
    """Recompute some tensors of a written merge from its inputs.

    Parameters
    ----------
    merger : Merger
        The merge.
    written : Checkpoint
        Its result, read back.
    seed : int
        Chooses the tensors, and a window of 2**20 elements within a larger one.
    tensors : int
        How many.

    Returns
    -------
    float
        Largest distance from the float64 value, in units of the last place of the output type;
        correct rounding gives at most 0.5. Distances that float64 itself may cause do not count.
    """
    names = [n for n, info in merger.donor.tensors.items() if info.dtype in FLOAT_DTYPES]
    worst = 0.0
    for i in permutation(seed, "merge/check", len(names)).tolist()[:tensors]:
        name = names[i]
        count = merger.donor.info(name).elements
        start = int(float(uniform(seed, f"merge/check/{name}", 1)) * max(0, count - _WINDOW))
        stop = min(count, start + _WINDOW)
        exact, magnitude = _expected(merger, name, start, stop)
        worst = max(worst, last_place_error(written.read_slice(name, start, stop), exact, magnitude))
    return worst


def last_place_error(values: torch.Tensor, exact: Array, magnitude: Array) -> float:
    """Largest distance of rounded values from exact ones, in units of their last place.

    Parameters
    ----------
    values : Tensor
        (n,), floating.
    exact : ndarray
        (n,), computed in float64.
    magnitude : ndarray
        (n,), sum of the absolute terms behind `exact`; 16 float64 roundings of it are allowed.

    Returns
    -------
    float
        Infinity where only one of the two is finite.
    """
    got: Array = values.double().numpy()
    finite = np.isfinite(exact)
    if not np.array_equal(finite, np.isfinite(got)):
        return float("inf")
    got, exact, magnitude = got[finite], exact[finite], magnitude[finite]
    info = torch.finfo(values.dtype)
    _, exponent = np.frexp(exact)
    unit = np.maximum(np.ldexp(1.0, exponent - 1 - _MANTISSA_BITS[values.dtype]), info.tiny * info.eps)
    distance = np.maximum(np.abs(got - exact) - 16 * np.finfo(np.float64).eps * magnitude, 0.0)
    return float(np.max(distance / unit, initial=0.0))


def _expected(merger: Merger, name: str, start: int, stop: int) -> tuple[Array, Array]:
    models = np.stack([_read(m, name, start, stop) for m in merger.models])
    factors, origin_factor = _factors(merger, name)
    value = np.einsum("k,kd->d", factors, models)
    magnitude = np.einsum("k,kd->d", np.abs(factors), np.abs(models))
    if merger.base and origin_factor is not None:
        origin = _read(merger.base, name, start, stop)
        value = value + origin_factor * origin
        magnitude = magnitude + (1 + np.abs(factors).sum()) * np.abs(origin)
    return value, magnitude


def _factors(merger: Merger, name: str) -> tuple[Array, float | None]:
    """Every method here is a linear combination: the factor of each model, and of the base."""
    weights, method = np.array(merger.weights, dtype=np.float64), merger.method
    if isinstance(method, LinearConfig):
        return (weights / weights.sum() if method.normalize else weights), None
    if isinstance(method, TaskArithmeticConfig):
        factors = method.scale * (weights / weights.sum() if method.normalize else weights)
        return factors, 1.0 - float(factors.sum())
    return _arc(merger, name, method), None


def _arc(merger: Merger, name: str, method: SlerpConfig) -> Array:
    count = merger.donor.info(name).elements
    gram = np.zeros((2, 2))
    for start in range(0, count, _WINDOW):
        pair = np.stack([_read(m, name, start, min(start + _WINDOW, count)) for m in merger.models])
        gram += pair @ pair.T
    t = method.t
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.clip(gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1]), -1.0, 1.0)
    angle = np.arccos(cosine) if np.isfinite(cosine) else 0.0
    if np.sin(angle) < 1e-6:
        return np.array([1 - t, t])
    return np.array([np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)])


def _read(model: ModelSource, name: str, start: int, stop: int) -> Array:
    return np.asarray(model.read(name, start, stop).numpy(), dtype=np.float64)
