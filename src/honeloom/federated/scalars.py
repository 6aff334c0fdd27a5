"""What zeroth-order clients need not send: directions follow from names, so that scalars alone say where they went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from honeloom.federated.messages import Factors, Log
from honeloom.ops.noise import uniform
from honeloom.tuning.config import MezoConfig
from honeloom.tuning.zeroth_order import ZerothOrder, accumulated, step_seeds, step_size

__all__ = ["Move", "ScalarLog", "SeedPool", "log_of", "moved_along", "moves_of", "named", "replayed"]

Pair = tuple[torch.Tensor, torch.Tensor]
MOST_MOVES, MOST_ENTRIES = 32, 1 << 13
"""Rounds that a log keeps, and clients in all of them: whoever is further behind is sent the factors, for steps that
are repeated take time and the log takes room."""
Scalars = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


def named(factors: Factors, trains: str, mezo: MezoConfig) -> dict[str, torch.Tensor]:
    """The tensors that directions are about, by the names that their numbers are drawn under."""
    return {
        f"{module}|{name}": pair[place]
        for module, pair in factors.items()
        for place, name in enumerate("ba")
        if trains in ("both", name) and (mezo.perturb == "all" or name == "b")
    }


def replayed(
    begun: Factors, scalars: Scalars, *, mezo: MezoConfig, seed: int, order: str, lr: float, trains: str
) -> dict[str, Pair]:
    """Where a client's scalars lead to from where it began, to the last bit.

    Parameters
    ----------
    begun : Factors
        Float32; not changed.
    scalars : ndarray
        (steps, directions).
    mezo : MezoConfig
        Of the steps.
    seed, order
        Of the federation, and `client/round`: directions follow from both.
    lr : float
        Of the client in that round.
    trains : {"both", "a", "b"}
        Which factors changed.
    """
    factors = {m: (b.clone(), a.clone()) for m, (b, a) in begun.items()}
    stepper = ZerothOrder(named(factors, trains, mezo), mu=mezo.mu, kind=mezo.direction)
    for step, mine in enumerate(scalars.tolist()):
        seeds = step_seeds(seed, order, step, scalars.shape[1])
        stepper.replay(list(zip(seeds, mine, strict=True)), lr)
    return factors


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """What a round of zeroth-order clients told: by client its name, share, learning rate, and its scalars.

    `scalars` is (clients, steps, directions).
    """

    round: int
    clients: tuple[tuple[str, float, float], ...]
    scalars: Scalars

    @property
    def bytes(self) -> int:
        """What it takes on the wire, about."""
        return int(self.scalars.nbytes) + 80 * len(self.clients)


@dataclass(slots=True)
class ScalarLog:
    """Moves of shared factors, from version `first` on; version 0 is where everybody begins.

    Attributes
    ----------
    entries : list of Move
        Those that are still kept: once they take more than the factors themselves, or are many, the oldest go.
    first : int
        Version that the first entry leads to.
    """

    entries: list[Move] = field(default_factory=list)
    first: int = 1

    @property
    def version(self) -> int:
        """Moves so far."""
        return self.first + len(self.entries) - 1

    def add(self, move: Move, most_bytes: int) -> None:
        """Take in one more, and forget old ones beyond the limit."""
        self.entries.append(move)
        while len(self.entries) > 1 and self._is_long(most_bytes):
            self.entries.pop(0)
            self.first += 1

    def _is_long(self, most_bytes: int) -> bool:
        clients = sum(len(entry.clients) for entry in self.entries)
        return (
            len(self.entries) > MOST_MOVES or clients > MOST_ENTRIES or sum(e.bytes for e in self.entries) > most_bytes
        )

    def after(self, held: int) -> tuple[int, list[Move]] | None:
        """The version to go on from and the moves since; None where they are not kept, or held is none of ours."""
        if not self.first - 1 <= held <= self.version:
            return None
        return held, self.entries[held - self.first + 1 :]


def log_of(moves: Sequence[Move]) -> tuple[Log, torch.Tensor]:
    """Moves as a task carries them: who moved, and all scalars one after the other."""
    flat = np.concatenate([m.scalars.reshape(-1) for m in moves]) if moves else np.zeros(0, dtype=np.float32)
    return tuple((m.round, m.clients) for m in moves), torch.from_numpy(flat.copy())


def moves_of(log: Log, flat: torch.Tensor, steps: int, directions: int) -> list[Move]:
    """Read what `log_of` made."""
    found, numbers, at = [], flat.numpy(), 0
    for number, clients in log:
        size = len(clients) * steps * directions
        found.append(Move(number, clients, numbers[at : at + size].reshape(len(clients), steps, directions)))
        at += size
    return found


@dataclass(frozen=True, slots=True)
class SeedPool:
    """Few seeds that all steps draw from, so that where anybody went is one number for each (FedKSeed).

    Parameters
    ----------
    size : int
        How many.
    seed : int
        Of the federation.

    References
    ----------
    Qin et al. 2024 (FedKSeed), arXiv:2312.06353.
    """

    size: int
    seed: int

    def seeds(self) -> list[int]:
        """Of every direction."""
        return step_seeds(self.seed, "pool", 0, self.size)

    def picks(self, order: str, steps: int, directions: int) -> npt.NDArray[np.int64]:
        """Which of them a client's steps use, (steps, directions); `order` is `client/round`."""
        draws = uniform(self.seed, f"zeroth-order/pool/{order}", steps * directions)
        return (draws * self.size).long().numpy().reshape(steps, directions)

    def sums(self, order: str, scalars: Scalars, lr: float) -> Sums:
        """By how much a client's steps moved along every seed, (size,)."""
        found, directions = np.zeros(self.size), scalars.shape[1]
        picks = self.picks(order, *scalars.shape)
        for j, scalar in zip(picks.reshape(-1).tolist(), scalars.reshape(-1).tolist(), strict=True):
            found[j] -= step_size(lr, scalar, directions)
        return found


def moved_along(begun: Factors, sums: Sums, *, pool: SeedPool, mezo: MezoConfig, trains: str) -> dict[str, Pair]:
    """Factors moved by so much along every seed of a pool: added up in float64, and rounded once.

    Parameters
    ----------
    begun : Factors
        Float32; not changed.
    sums : ndarray
        (K,).
    pool, mezo, trains
        As above.
    """
    factors = {m: (b.clone(), a.clone()) for m, (b, a) in begun.items()}
    seeds = pool.seeds()
    for name, tensor in named(factors, trains, mezo).items():
        tensor.add_(accumulated(tensor, name, seeds, sums.tolist(), mezo.direction))
    return factors
