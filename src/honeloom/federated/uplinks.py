"""What travels between server and clients: factors, the scalars of zeroth-order steps, or sums over a pool of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from honeloom.errors import MessageError
from honeloom.federated.beginnings import Beginnings
from honeloom.federated.continuation import follows
from honeloom.federated.messages import Manifest, TrainReply, digest_of
from honeloom.federated.scalars import Move, Sums, log_of, moved_along, replayed
from honeloom.federated.state import ClientRecord
from honeloom.tuning.config import MezoConfig

__all__ = ["PoolUplink", "ScalarUplink", "TensorUplink", "Uplink", "uplink_of"]


class Uplink(Protocol):
    """What a server sends beside the settings, what it gets, and what it keeps of it."""

    def manifest(self, record: ClientRecord) -> Manifest:
        """What a client's reply may hold."""

    def carried(self, record: ClientRecord) -> dict[str, Any]:
        """Fields of a client's task: where it begins, and what it lacks of what it holds from round to round."""

    def complete(self, record: ClientRecord, reply: TrainReply) -> TrainReply:
        """The reply with the factors that it stands for.

        Raises
        ------
        MessageError
            What it tells does not go together.
        """

    def settle(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply], shares: Sequence[float]) -> None:
        """Note what an aggregated round is to those that will follow; the state has moved, its round has not."""


def uplink_of(begun: Beginnings) -> Uplink:
    """That of the settings."""
    kinds: dict[str, Callable[[Beginnings], Uplink]] = {
        "tensors": TensorUplink, "scalars": ScalarUplink, "seed-pool": PoolUplink,
    }  # fmt: skip
    return kinds[begun.config.uplink](begun)


class TensorUplink:
    """Factors up; shared factors and frozen additions down."""

    def __init__(self, begun: Beginnings) -> None:
        self.begun = begun

    def manifest(self, record: ClientRecord) -> Manifest:
        """Factors of the client's rank."""
        return Manifest.of(self.begun.modules, record.rank)

    def carried(self, record: ClientRecord) -> dict[str, Any]:
        """Shared factors whole, frozen additions since the version that the client holds."""
        return _tensors(self.begun, record)

    def complete(self, record: ClientRecord, reply: TrainReply) -> TrainReply:
        """As it is."""
        return reply

    def settle(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply], shares: Sequence[float]) -> None:
        """Nothing is to be noted."""


class ScalarUplink:
    """Scalars up, from which the server has the very factors; for averages, everybody's scalars down."""

    def __init__(self, begun: Beginnings) -> None:
        config = begun.config
        assert isinstance(config.optimizer, MezoConfig)  # the settings have seen to it
        self.begun, self.mezo = begun, config.optimizer
        self.shape = (config.local_steps, self.mezo.directions)
        self.follows = follows(config.aggregation.type, config.uplink, config.server.type)

    def manifest(self, record: ClientRecord) -> Manifest:
        """One number for each step and direction."""
        return Manifest.of_arrays(scalars=("F32", math.prod(self.shape)))

    def carried(self, record: ClientRecord) -> dict[str, Any]:
        """Scalars since what the client holds, or the shared factors where they are smaller or have to be."""
        if not self.follows:
            return _tensors(self.begun, record)
        state = self.begun.state
        found = state.log.after(state.held.get(record.id, 0))
        whole = self.begun.download(record.rank)
        version, digest = state.log.version, digest_of(state.shared) if state.shared else ""
        if found is None or (whole and sum(move.bytes for move in found[1]) > _bytes(whole)):
            return {"version": version, "follows": True, "shared": whole, "digest": digest}
        log, flat = log_of(found[1])
        arrays = {"log": flat} if log else {}
        return {
            "since": found[0], "version": version, "follows": True, "log": log, "digest": digest, "arrays": arrays,
        }  # fmt: skip

    def complete(self, record: ClientRecord, reply: TrainReply) -> TrainReply:
        """Factors that the scalars lead to; the client says what its own are."""
        begun = self.begun
        factors = replayed(
            begun.of(record)[0], self._scalars(reply), mezo=self.mezo, seed=begun.config.seed,
            order=f"{record.id}/{reply.round}", lr=record.lr, trains=begun.trains,
        )  # fmt: skip
        if digest_of(factors) != reply.digest:
            raise MessageError("reply: its scalars do not lead to the factors that it says it has")
        return replace(reply, factors=factors)

    def settle(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply], shares: Sequence[float]) -> None:
        """Keep the scalars, by which clients move on."""
        if self.follows:
            who = tuple((c.id, share, c.lr) for c, share in zip(clients, shares, strict=True))
            move = Move(self.begun.number, who, np.stack([self._scalars(reply) for reply in replies]))
            self.begun.state.log.add(move, _bytes(self.begun.state.shared))

    def _scalars(self, reply: TrainReply) -> Any:
        return reply.arrays["scalars"].numpy().reshape(self.shape)


class PoolUplink:
    """Sums over a pool of seeds, up and down: messages of one size, whatever the steps and rounds."""

    def __init__(self, begun: Beginnings) -> None:
        assert begun.pool is not None  # `uplink_of` chose by it
        assert isinstance(begun.config.optimizer, MezoConfig)  # the settings have seen to both
        self.begun, self.pool, self.mezo = begun, begun.pool, begun.config.optimizer
        self.secure = begun.config.privacy.secagg

    def manifest(self, record: ClientRecord) -> Manifest:
        """One number for each seed, maybe under a mask."""
        if self.secure:
            return Manifest.of_arrays(masked=("I64", self.pool.size))
        return Manifest.of_arrays(pool=("F32", self.pool.size))

    def carried(self, record: ClientRecord) -> dict[str, Any]:
        """By how much every seed moved the start so far: all that even a client that was away needs."""
        sums = self.begun.state.pool
        return {} if sums is None else {"arrays": {"pool": torch.from_numpy(sums.copy())}}

    def complete(self, record: ClientRecord, reply: TrainReply) -> TrainReply:
        """Factors that the client's sums lead to; without adapters, as it is."""
        if self.begun.config.method == "full":
            return reply
        begun = self.begun.of(record)[0]
        if reply.digest != digest_of(begun):
            raise MessageError("reply: the client began with other factors than the server's")
        if self.secure:
            return reply
        sums = reply.arrays["pool"].double().numpy()
        return replace(
            reply, factors=moved_along(begun, sums, pool=self.pool, mezo=self.mezo, trains=self.begun.trains)
        )

    def settle(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply], shares: Sequence[float]) -> None:
        """Add up the clients' sums, by their shares."""
        mine = [reply.arrays["pool"].double().numpy() for reply in replies]
        self.add(np.sum([share * sums for share, sums in zip(shares, mine, strict=True)], axis=0))

    def add(self, sums: Sums) -> None:
        """Move the start; with adapters, the shared factors are what it is then."""
        begun, state = self.begun, self.begun.state
        state.pool = sums + (0.0 if state.pool is None else state.pool)
        if begun.config.method == "lora":
            rank = max(client.rank_in(begun.number, 8) for client in begun.config.members())
            scale = begun.scale(rank)
            state.shared = {module: (b * scale, a) for module, (b, a) in begun.pooled(rank).items()}


def _tensors(begun: Beginnings, record: ClientRecord) -> dict[str, Any]:
    state = begun.state
    since, frozen = state.frozen.after(state.held.get(record.id, 0))
    return {
        "since": since, "version": state.frozen.version, "shared": begun.download(record.rank), "frozen": frozen,
    }  # fmt: skip


def _bytes(factors: Any) -> int:
    return sum(t.numel() * t.element_size() for pair in factors.values() for t in pair)
