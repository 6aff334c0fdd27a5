"""Means of several models on the sphere of directions.

Both stay in the span of the models, so that their dot products alone tell the factors.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from honeloom.merging.engine.gram import gram
from honeloom.merging.engine.sums import Array
from honeloom.merging.engine.tensors import Merged, Rule, Tensors, WeightedSum
from honeloom.merging.linear import weight_total

__all__ = ["karcher", "multislerp"]

_SMALLEST_SINE = 1e-6
"""Lengths of sums of unit vectors come from squares, and so are known to about 1e-8."""


def _plan_multislerp(tensors: Tensors, *, normalize: bool = True, eps: float = 1e-8) -> Merged:
    """Interpolate between several models: their mean direction, as long as they are on average.

    With unit vectors u_k and m = sum of w_k u_k: (sum of w_k |x_k|) m / |m|. The source then averages the models'
    residuals in the tangent space at m; that average is always zero, for m is their mean.

    Parameters
    ----------
    tensors : Tensors
        K models; with a base, their task vectors are taken, and added to the base.
    normalize : bool
        Divide the weights by their sum.
    eps : float
        A vector shorter than this has no direction and counts as zero.

    Returns
    -------
    callable
        Elements start..stop of the result, float64. Where |m| is below 1e-6 (or `eps`) no direction is the mean: it is
        the weighted sum then, and a warning tells.

    Raises
    ------
    ConfigError
        The weights sum to 0 and `normalize` is set.

    References
    ----------
    Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea.
    """
    deltas = tensors.base is not None
    total = weight_total(tensors.weights) if normalize else 1.0
    weights = np.array(tensors.weights) / total
    lengths, cosines = _directions(gram(tensors, deltas=deltas).numpy(), eps)
    mean = _length(weights, cosines)
    if mean < max(eps, _SMALLEST_SINE):
        factors = _straight(weights, lengths, tensors.name)
    else:
        factors = _of_vectors(weights / mean, lengths, float(weights @ lengths))
    return WeightedSum(tensors, factors, from_base=deltas)


def _plan_karcher(tensors: Tensors, *, max_iter: int = 10, tol: float = 1e-5) -> Merged:
    """Riemannian centre of mass of the models' directions, as long as the models are on average.

    The point on the sphere where the weighted sum of log maps is zero, by steps along that sum from the mean
    direction. Zero tensors have no direction, but count in the mean length.

    Parameters
    ----------
    tensors : Tensors
        K models.
    max_iter : int
        Steps at most; a warning tells if the last one was not shorter than `tol`.
    tol : float
        Ends once the step, an angle in radians, is shorter.

    Returns
    -------
    callable
        Elements start..stop of the result, float64. Where the mean of the unit vectors is shorter than 1e-6 no
        direction is the centre: it is the weighted average then, and a warning tells.

    Raises
    ------
    ConfigError
        The weights sum to 0, or those of the tensors that are not zero do.

    References
    ----------
    Karcher 1977, doi:10.1002/cpa.3160300502.
    """
    weights = np.array(tensors.weights) / weight_total(tensors.weights)
    lengths, cosines = _directions(gram(tensors, deltas=False).numpy(), 0.0)
    alive = lengths > 0
    shares = np.where(alive, weights, 0.0)
    if alive.any():
        shares /= weight_total(shares[alive].tolist())
    mean = _length(shares, cosines)
    if mean < _SMALLEST_SINE or not np.isfinite(cosines).all():
        return WeightedSum(tensors, _straight(weights, lengths, tensors.name))
    centre = _centre(shares, shares / mean, cosines, max_iter, tol, tensors.name)
    return WeightedSum(tensors, _of_vectors(centre, lengths, float(weights @ lengths)))


multislerp = Rule(_plan_multislerp)
"""Mean direction of several models, as long as they are on average."""
karcher = Rule(_plan_karcher)
"""Riemannian centre of mass on the sphere."""


def _directions(grams: Array, shortest: float) -> tuple[Array, Array]:
    """Lengths (K,), 0 where they do not exceed the shortest; and cosines (K, K), 0 beside those."""
    lengths = np.sqrt(np.diag(grams))
    lengths = np.where(lengths <= shortest, 0.0, lengths)
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths != 0)
    with np.errstate(invalid="ignore"):
        cosines = grams * inverse[:, None] * inverse
    np.fill_diagonal(cosines, np.where(lengths == 0, 0.0, cosines.diagonal() * 0.0 + 1.0))
    return lengths, cosines


def _length(factors: Array, cosines: Array) -> float:
    """Of a sum of factors times unit vectors."""
    return math.sqrt(max(0.0, float(factors @ cosines @ factors)))


def _of_vectors(factors: Array, lengths: Array, scale: float) -> tuple[float, ...]:
    """Factors of vectors, from those of their unit vectors."""
    return tuple(scale * f / n if n else 0.0 for f, n in zip(factors.tolist(), lengths.tolist(), strict=True))


def _straight(weights: Array, lengths: Array, name: str) -> tuple[float, ...]:
    if (lengths > 0).any() and np.isfinite(lengths).all():
        warnings.warn(
            f"{name or 'tensor'}: the directions of the models cancel, none is their mean; the models are averaged",
            stacklevel=2,
        )
    return tuple(weights.tolist())


def _centre(shares: Array, start: Array, cosines: Array, max_iter: int, tol: float, name: str) -> Array:
    """Factors of the unit vectors whose sum is the centre; a vector opposite to it has no log map and adds nothing."""
    centre, step = start, math.inf
    for _ in range(max_iter):
        dots = np.clip(cosines @ centre, -1.0, 1.0)
        angles = np.arccos(dots)
        sines = np.sin(angles)
        stretch = np.divide(angles, sines, out=np.where(dots > 0, 1.0, 0.0), where=sines >= _SMALLEST_SINE)
        tangent = shares * stretch
        tangent = tangent - float(tangent @ dots) * centre
        step = _length(tangent, cosines)
        if step < tol:
            return centre
        centre = math.cos(step) * centre + math.sin(step) / step * tangent
        centre = centre / _length(centre, cosines)
    warnings.warn(
        f"{name or 'tensor'}: the last of {max_iter} steps was {step:.2g} long, tol is {tol:g}; raise max_iter",
        stacklevel=2,
    )
    return centre
