"""Steps from forward passes alone: two losses along a random direction give a scalar, seed and scalar give the step.

Directions come from a counter-based generator, by seed and tensor name, so that whoever knows the
seeds and scalars can repeat every step, to the last bit, without the data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from honeloom.ops.noise import normal, rademacher

__all__ = ["Kind", "Probe", "ZerothOrder", "direction", "step_seeds", "step_size"]

Kind = Literal["gaussian", "rademacher"]
Loss = Callable[[], float]
_DRAW = {"gaussian": normal, "rademacher": rademacher}


def direction(seed: int, name: str, like: torch.Tensor, kind: Kind) -> torch.Tensor:
    """One tensor's part of a random direction: independent entries of mean 0 and variance 1.

    Parameters
    ----------
    seed : int
        Of the direction.
    name : str
        The tensor's; others get independent numbers.
    like : Tensor
        For shape and device.
    kind : {"gaussian", "rademacher"}
        Standard normal numbers, or signs.

    Returns
    -------
    Tensor
        float32.
    """
    drawn = _DRAW[kind](seed, f"zeroth-order/{name}", like.numel(), dtype=torch.float32, device=like.device)
    return drawn.view(like.shape)


def step_size(lr: float, scalar: float, directions: int = 1) -> float:
    """What a direction is multiplied with: lr * scalar / directions, rounded once to float32."""
    return float(np.float32(lr * scalar / directions))


def step_seeds(seed: int, name: str, step: int, directions: int) -> list[int]:
    """Seeds of one step's directions: whoever knows the name of the work and its step can derive them.

    Parameters
    ----------
    seed : int
        Of the work.
    name : str
        Of the part of it, such as a client and a round.
    step, directions : int
        Which step, and how many seeds.

    Returns
    -------
    list of int
        Below 2**63.
    """
    texts = (f"{seed}/zeroth-order/{name}/{step}/{k}" for k in range(directions))
    return [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "little") >> 1 for t in texts]


@dataclass(frozen=True, slots=True)
class Probe:
    """What one direction told.

    Attributes
    ----------
    seed : int
        Of the direction.
    scalar : float
        (plus - minus) / (2 mu) as float32 has it, maybe clipped; 0 where a loss was not finite.
    plus, minus : float
        Losses on both sides.
    """

    seed: int
    scalar: float
    plus: float
    minus: float

    @property
    def finite(self) -> bool:
        """Whether both losses were."""
        return math.isfinite(self.plus) and math.isfinite(self.minus)

    @property
    def loss(self) -> float:
        """Mean of both sides: the loss in the middle, up to mu squared."""
        return (self.plus + self.minus) / 2


class ZerothOrder:
    """Two-point estimates and their steps, in place, on some tensors.

    The gradient of L at theta is estimated by g z with g = (L(theta + mu z) - L(theta - mu z)) / (2 mu);
    for quadratics its mean is the gradient, whatever mu. A step is theta - lr g z.

    With `exact`, values are kept aside while losses are taken, so that a step is one rounded subtraction from
    the very values there were. Without, they are moved there and back (+mu, -2 mu, +mu - lr g), which
    needs no copy and drifts in the last bits; `replay` then drifts alike.

    Parameters
    ----------
    params : mapping
        Tensors by name, changed in place, without gradients. float32, for smaller types lose the steps.
    mu : float
        Distance to both sides.
    kind : {"gaussian", "rademacher"}
        Of the directions.
    exact : bool
        Keep a copy of the values. For adapters it is small.
    cache : bool
        Keep the direction instead of drawing it again for every pass: one more copy, fewer numbers drawn.
    clip : float or None
        Largest magnitude of a scalar.

    References
    ----------
    Spall 1992, doi:10.1109/9.119632; Malladi et al. 2023 (MeZO), arXiv:2305.17333.
    """

    def __init__(
        self, params: Mapping[str, torch.Tensor], *, mu: float = 1e-3, kind: Kind = "gaussian", exact: bool = True,
        cache: bool = True, clip: float | None = None,
    ) -> None:  # fmt: skip
        if not (math.isfinite(mu) and mu > 0) or (clip is not None and not clip > 0):
            raise ValueError(f"mu {mu} and clip {clip} must be over 0")
        self.params = dict(sorted(params.items()))
        self.mu, self.kind, self.exact, self.cache, self.clip = float(np.float32(mu)), kind, exact, cache, clip
        self._cached: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    @torch.no_grad()
    def probe(self, loss: Loss, seed: int) -> Probe:
        """Take the losses on both sides of where the tensors are; they are there afterwards, up to drift.

        Parameters
        ----------
        loss : callable
            Of the model with the tensors as they are: the same rows and no dropout at both calls.
        seed : int
            Of the direction.
        """
        with self._kept() as kept:
            self._to_side(seed, +1, kept)
            plus = float(loss())
            self._to_side(seed, -1, kept)
            minus = float(loss())
            if kept is None:
                self._move(seed, self.mu)
        return self._judged(seed, plus, minus)

    @torch.no_grad()
    def step(self, loss: Loss, seeds: Sequence[int], lr: float) -> list[Probe]:
        """Estimate along each direction, then move along all of them by their mean.

        Returns
        -------
        list of Probe
            One per seed: with their scalars, `replay` repeats the step.
        """
        if self.exact or len(seeds) > 1:
            probes = [self.probe(loss, seed) for seed in seeds]
            self._apply([(p.seed, p.scalar) for p in probes], lr)
            return probes
        (seed,) = seeds  # back and on in one pass
        self._to_side(seed, +1, None)
        plus = float(loss())
        self._to_side(seed, -1, None)
        probe = self._judged(seed, plus, float(loss()))
        self._move(seed, self.mu, -step_size(lr, probe.scalar))
        return [probe]

    @torch.no_grad()
    def replay(self, scalars: Sequence[tuple[int, float]], lr: float) -> None:
        """Repeat a step from seeds and scalars alone: the bits are those that `step` left.

        Parameters
        ----------
        scalars : sequence of (int, float)
            Seed and scalar of every direction of one step.
        lr : float
            Of the step.
        """
        if self.exact:
            self._apply(scalars, lr)
            return
        for seed, _ in scalars:
            self._move(seed, self.mu)
            self._move(seed, -2 * self.mu)
            if len(scalars) > 1:
                self._move(seed, self.mu)
        if len(scalars) > 1:
            self._apply(scalars, lr)
        else:
            ((seed, scalar),) = scalars
            self._move(seed, self.mu, -step_size(lr, scalar))

    def _judged(self, seed: int, plus: float, minus: float) -> Probe:
        """The scalar of two losses; their difference is taken in double precision."""
        if not (math.isfinite(plus) and math.isfinite(minus)):
            return Probe(seed, 0.0, plus, minus)
        scalar = (plus - minus) / (2 * self.mu)
        if self.clip is not None:
            scalar = max(-self.clip, min(self.clip, scalar))
        return Probe(seed, float(np.float32(scalar)), plus, minus)

    def _apply(self, scalars: Sequence[tuple[int, float]], lr: float) -> None:
        for seed, scalar in scalars:
            self._move(seed, -step_size(lr, scalar, len(scalars)))

    @contextmanager
    def _kept(self) -> Iterator[dict[str, torch.Tensor] | None]:
        """A copy of the values, put back at the end; None without `exact`."""
        if not self.exact:
            yield None
            return
        kept = {name: tensor.clone() for name, tensor in self.params.items()}
        try:
            yield kept
        finally:
            for name, tensor in self.params.items():
                tensor.copy_(kept[name])

    def _to_side(self, seed: int, sign: int, kept: Mapping[str, torch.Tensor] | None) -> None:
        """Go to theta + sign mu z: from the kept values, or from where the other side left."""
        if kept is not None:
            for name, tensor in self.params.items():
                tensor.copy_(kept[name])
            self._move(seed, sign * self.mu)
        else:
            self._move(seed, self.mu if sign > 0 else -2 * self.mu)

    def _move(self, seed: int, *amounts: float) -> None:
        """Add the direction times the sum of some amounts; product and sum are rounded apart, on every device alike."""
        amount = float(np.float32(math.fsum(amounts)))
        if not amount:
            return
        for name, tensor in self.params.items():
            z = self._direction(seed, name, tensor)
            tensor.add_(z * amount)

    def _direction(self, seed: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not self.cache:
            return direction(seed, name, tensor, self.kind)
        if self._cached[0] != seed:
            self._cached = (seed, {n: direction(seed, n, t, self.kind) for n, t in self.params.items()})
        return self._cached[1][name]
