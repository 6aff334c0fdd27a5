"""Steps from forward passes alone: two losses along a random direction give a scalar, seed and scalar give the step.

Directions come from a counter-based generator, by seed and tensor name, so that whoever knows the
seeds and scalars can repeat every step, to the last bit, without the data.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from honeloom.ops.noise import gaussian, rademacher, stream_key

__all__ = ["Judge", "Kind", "Loss", "Probe", "ZerothOrder", "accumulated", "direction", "step_seeds", "step_size"]

Kind = Literal["gaussian", "rademacher"]
Loss = Callable[[], float | npt.NDArray[np.float64]]
Judge = Callable[[Any, Any], float]
_DRAW = {"gaussian": gaussian, "rademacher": rademacher}
_PIECE = 1 << 17


@cache
def _kernels() -> Any:
    """The compiled streams; numba is imported when a step begins and not before."""
    return importlib.import_module("honeloom.ops.noise_kernels")


def _host(tensor: torch.Tensor) -> npt.NDArray[np.float32] | None:
    """A flat view for the kernels; None where torch must do the work."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        return None
    flat: npt.NDArray[np.float32] = tensor.detach().view(-1).numpy()
    return flat


def _stream(name: str) -> str:
    return f"zeroth-order/{name}"


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
    drawn = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    if (flat := _host(drawn)) is None:
        return _DRAW[kind](seed, _stream(name), like.numel(), device=like.device).view(like.shape)
    _kernels().fill(kind == "rademacher", flat, 0, *stream_key(kind, seed, _stream(name)))
    return drawn


def accumulated(
    like: torch.Tensor, name: str, seeds: Sequence[int], coefficients: Sequence[float], kind: Kind
) -> torch.Tensor:
    """One tensor's part of a sum of directions: how a step for each of many seeds becomes a model.

    Block by block in float64, in the order given, and rounded once: the bits are the same on every device, and no
    direction is ever in memory as a whole.

    Parameters
    ----------
    like, name, kind
        As of `direction`.
    seeds : sequence of int
        Of the directions.
    coefficients : sequence of float
        One per seed; those of zero cost nothing.

    Returns
    -------
    Tensor
        Shape and device of `like`, float32.

    Raises
    ------
    ValueError
        A coefficient is not finite, or there are more of one than of the other.

    References
    ----------
    Qin et al. 2024 (FedKSeed), arXiv:2312.06353.
    """
    used = [(seed, float(c)) for seed, c in zip(seeds, coefficients, strict=True) if c]
    if not all(math.isfinite(c) for _, c in used):
        raise ValueError(f"coefficients of {name}: not all are finite")
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    if not used:
        return total
    if (flat := _host(total)) is not None:
        keys = np.array([stream_key(kind, seed, _stream(name)) for seed, _ in used], np.int64)
        _kernels().accumulate(kind == "rademacher", flat, keys, np.array([c for _, c in used]))
        return total
    whole = total.view(-1)
    for first in range(0, whole.numel(), _PIECE):
        piece = whole[first : first + _PIECE]
        piece.copy_(_summed(piece, _stream(name), used, kind, first))
    return total


def _summed(
    piece: torch.Tensor, stream: str, used: Sequence[tuple[int, float]], kind: Kind, first: int
) -> torch.Tensor:  # fmt: skip
    """The sum of directions on some elements, in float64."""
    total = torch.zeros(piece.shape, dtype=torch.float64, device=piece.device)
    for seed, coefficient in used:
        z = _DRAW[kind](seed, stream, piece.numel(), start=first, device=piece.device)
        total.add_(z.double().mul_(coefficient))
    return total


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
        (plus - minus) / (2 mu) as float32 has it, maybe clipped, or what the judge said; 0 where a loss was not finite.
    plus, minus : float
        Losses on both sides; means where there were several.
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


class _Hosted:
    """Tensors that the kernels can work on: all of them in one call, the numbers beside them in one buffer."""

    def __init__(self, params: Mapping[str, torch.Tensor], kind: Kind) -> None:
        self.flats = {name: flat for name, t in params.items() if (flat := _host(t)) is not None}
        self.signs, self.kind = kind == "rademacher", kind
        self._where = np.array([flat.ctypes.data for flat in self.flats.values()], np.int64)
        self._sizes = np.array([flat.size for flat in self.flats.values()], np.int64)
        self._seed: int | None = None
        self._keys = np.zeros((0, 2), np.int64)
        self._drawn: int | None = None
        self._z: npt.NDArray[np.float32] | None = None
        self._kept: npt.NDArray[np.float32] | None = None

    def add(self, seed: int, amount: float, cache: bool) -> None:
        """Add the direction times a number: drawn on the way, or once."""
        if not cache:
            _kernels().add(self.signs, self._where, self._sizes, self._keys_of(seed), amount)
            return
        if self._drawn != seed:
            self._draw(seed)
        _kernels().add_drawn(self._where, self._sizes, self._z, amount)

    def keep(self) -> None:
        """Put the values aside."""
        if self._kept is None:
            self._kept = np.empty(int(self._sizes.sum()), np.float32)
        _kernels().copy(self._where, self._sizes, self._kept, False)

    def put_back(self) -> None:
        """Have the values that were put aside."""
        _kernels().copy(self._where, self._sizes, self._kept, True)

    def _draw(self, seed: int) -> None:
        self._drawn, first = None, 0
        if self._z is None:
            self._z = np.empty(int(self._sizes.sum()), np.float32)
        for size, key in zip(self._sizes.tolist(), self._keys_of(seed).tolist(), strict=True):
            _kernels().fill(self.signs, self._z[first : first + size], 0, *key)
            first += size
        self._drawn = seed

    def _keys_of(self, seed: int) -> npt.NDArray[np.int64]:
        if self._seed != seed:
            keys = [stream_key(self.kind, seed, _stream(name)) for name in self.flats]
            self._seed, self._keys = seed, np.array(keys, np.int64)
        return self._keys


class _Others:
    """Tensors on other devices, of other types, or with gaps: the same by torch, to the same bits."""

    def __init__(self, params: Mapping[str, torch.Tensor], kind: Kind) -> None:
        self.params, self.kind = dict(params), kind
        self._drawn: tuple[int, dict[str, torch.Tensor]] = (-1, {})
        self._kept: dict[str, torch.Tensor] = {}

    def add(self, seed: int, amount: float, cache: bool) -> None:
        """Add the direction times a number; product and sum are rounded apart, on every device alike."""
        if cache and self._drawn[0] != seed:
            self._drawn = (seed, {n: direction(seed, n, t, self.kind) for n, t in self.params.items()})
        for name, tensor in self.params.items():
            z = self._drawn[1][name] if cache else direction(seed, name, tensor, self.kind)
            tensor.add_(z * amount)

    def keep(self) -> None:
        """Put the values aside."""
        self._kept = {name: tensor.clone() for name, tensor in self.params.items()}

    def put_back(self) -> None:
        """Have the values that were put aside."""
        for name, tensor in self.params.items():
            tensor.copy_(self._kept[name])


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
        Tensors by name, changed in place, without gradients. float32, for smaller types lose the steps. They must
        keep their storage while this is in use.
    mu : float
        Distance to both sides.
    kind : {"gaussian", "rademacher"}
        Of the directions.
    exact : bool
        Keep a copy of the values. For adapters it is small.
    cache : bool
        Keep the direction instead of drawing it again for every pass: one more copy, fewer numbers drawn. With `exact`,
        a loss that can is asked for both sides at once.
    clip : float or None
        Largest magnitude of a scalar.
    judge : callable or None
        Makes the scalar of what the loss returned on both sides, in place of (plus - minus) / (2 mu). It is asked
        even where they are not finite, so that private steps can have their noise all the same.

    Raises
    ------
    ValueError
        mu or clip is not over 0, or there is a clip for a judge, who does that by itself.

    References
    ----------
    Spall 1992, doi:10.1109/9.119632; Malladi et al. 2023 (MeZO), arXiv:2305.17333.
    """

    def __init__(
        self, params: Mapping[str, torch.Tensor], *, mu: float = 1e-3, kind: Kind = "gaussian", exact: bool = True,
        cache: bool = True, clip: float | None = None, judge: Judge | None = None,
    ) -> None:  # fmt: skip
        if not (math.isfinite(mu) and mu > 0) or (clip is not None and not clip > 0):
            raise ValueError(f"mu {mu} and clip {clip} must be over 0")
        if judge is not None and clip is not None:
            raise ValueError("clip is for the scalars of losses; a judge limits its own")
        self.params = dict(sorted(params.items()))
        self.mu, self.kind, self.exact, self.cache, self.clip = float(np.float32(mu)), kind, exact, cache, clip
        self.judge = judge
        hosted = _Hosted(self.params, kind)
        others = {name: t for name, t in self.params.items() if name not in hosted.flats}
        self._parts = [part for part, some in ((hosted, hosted.flats), (_Others(others, kind), others)) if some]

    @torch.no_grad()
    def probe(self, loss: Loss, seed: int) -> Probe:
        """Take the losses on both sides of where the tensors are; they are there afterwards, up to drift.

        Parameters
        ----------
        loss : callable
            Of the model with the tensors as they are: the same rows and no dropout at both calls. It returns
            a number, or one per row, shape (rows,). One that has a method `both` (values on either side, by name,
            give losses on either side) is asked by it where directions and values are kept.
        seed : int
            Of the direction.
        """
        if self.exact and self.cache and (both := getattr(loss, "both", None)) is not None:
            return self._judged(seed, *both(*self._sides(seed)))
        with self._kept():
            self._to_side(seed, +1)
            plus = loss()
            self._to_side(seed, -1)
            minus = loss()
            if not self.exact:
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
        self._to_side(seed, +1)
        plus = loss()
        self._to_side(seed, -1)
        probe = self._judged(seed, plus, loss())
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

    def _judged(self, seed: int, plus: Any, minus: Any) -> Probe:
        """The scalar of two losses; their difference is taken in double precision."""
        means = tuple(float(np.mean(side)) if np.size(side) else 0.0 for side in (plus, minus))
        if self.judge is not None:
            scalar = float(self.judge(plus, minus))
        elif all(map(math.isfinite, means)):
            scalar = (means[0] - means[1]) / (2 * self.mu)
            if self.clip is not None:
                scalar = max(-self.clip, min(self.clip, scalar))
        else:
            scalar = 0.0
        return Probe(seed, float(np.float32(scalar)) if math.isfinite(scalar) else 0.0, *means)

    def _apply(self, scalars: Sequence[tuple[int, float]], lr: float) -> None:
        for seed, scalar in scalars:
            self._move(seed, -step_size(lr, scalar, len(scalars)))

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """With `exact`, values are put aside, and put back at the end."""
        if not self.exact:
            yield
            return
        for part in self._parts:
            part.keep()
        try:
            yield
        finally:
            self._put_back()

    def _sides(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Copies of the values on both sides."""
        found = []
        with self._kept():
            for sign in (+1, -1):
                self._to_side(seed, sign)
                found.append({name: tensor.clone() for name, tensor in self.params.items()})
        return found

    def _put_back(self) -> None:
        for part in self._parts:
            part.put_back()

    def _to_side(self, seed: int, sign: int) -> None:
        """Go to theta + sign mu z: from the kept values, or from where the other side left."""
        if self.exact:
            if sign < 0:
                self._put_back()
            self._move(seed, sign * self.mu)
        else:
            self._move(seed, self.mu if sign > 0 else -2 * self.mu)

    def _move(self, seed: int, *amounts: float) -> None:
        """Add the direction times the sum of some amounts, as float32 has it."""
        if amount := float(np.float32(math.fsum(amounts))):
            for part in self._parts:
                part.add(seed, amount, self.cache)
