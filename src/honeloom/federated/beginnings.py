"""What clients begin a round with, as the server knows it: the same numbers that they compute themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from honeloom.federated.client import fresh_factors, split_shared
from honeloom.federated.continuation import Continuation, continuation_of
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.scalars import SeedPool, Sums, moved_along
from honeloom.federated.state import ClientRecord, ServerState
from honeloom.tuning.config import MezoConfig

__all__ = ["Beginnings"]

Pair = tuple[torch.Tensor, torch.Tensor]
Pairs = dict[str, Pair]


class Beginnings:
    """Where the next round's clients begin.

    Parameters
    ----------
    config : FederateConfig
        Settings.
    modules : mapping
        Shape (m, n) of every module with an adapter; without adapters, of what is trained itself.
    state : ServerState
        Of the server, which goes on changing it.
    """

    def __init__(self, config: FederateConfig, modules: Mapping[str, tuple[int, int]], state: ServerState) -> None:
        self.config = config
        self.modules = dict(sorted(modules.items()))
        self.state = state
        self.how: Continuation = continuation_of(config.aggregation.type, reset=config.starts == "reset")
        self.pool = SeedPool(config.pool_size, config.seed) if config.uplink == "seed-pool" else None
        self._moved: tuple[Sums | None, Pairs] | None = None

    @property
    def number(self) -> int:
        """Of the round that is next, from 1."""
        return self.state.round + 1

    @property
    def trains(self) -> str:
        """Which factors the round trains."""
        return self.how.trains(self.number)

    def alpha(self, rank: int) -> float:
        """LoRA's alpha of a rank."""
        return self.config.alpha if self.config.alpha is not None else 2.0 * rank

    def scale(self, rank: int) -> float:
        """Of an adapter of a rank."""
        return self.alpha(rank) / rank

    def download(self, rank: int) -> Pairs:
        """Shared factors as a client needs them: all columns, or no more than it trains."""
        if self.how.start == "carry":
            return self.state.shared
        return {name: (b[:, :rank].contiguous(), a[:rank].contiguous()) for name, (b, a) in self.state.shared.items()}

    def of(self, record: ClientRecord) -> tuple[Pairs, Pairs]:
        """What a client begins with, as it computes it: trained factors, and what it keeps frozen beside them."""
        if self.pool is not None:
            return self.pooled(record.rank), {}
        if self.how.start == "fresh" or not self.state.shared:
            name = "shared" if self.how.alike else f"{record.id}/{self.number}"
            return fresh_factors(self.modules, record.rank, self.config.seed, name), {}
        shared = self.download(record.rank)
        return split_shared(
            shared, self.modules, record.rank, self.scale(record.rank), keep=self.how.start == "carry"
        )  # fmt: skip

    def fresh(self, rank: int) -> Pairs:
        """What everybody began with in the first round."""
        return fresh_factors(self.modules, rank, self.config.seed, "shared")

    def pooled(self, rank: int) -> Pairs:
        """Fresh factors, moved along the seeds of the pool; computed once for each state of it."""
        assert self.pool is not None  # only the uplink of a pool asks
        assert isinstance(self.config.optimizer, MezoConfig)  # the settings have seen to both
        sums = self.state.pool
        if self._moved is None or self._moved[0] is not sums:
            begun = self.fresh(rank)
            if sums is not None:
                begun = moved_along(begun, sums, pool=self.pool, mezo=self.config.optimizer, trains=self.trains)
            self._moved = (sums, begun)
        return self._moved[1]
