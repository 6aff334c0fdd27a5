"""A client: from a task to a reply, whatever carries the two."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from honeloom.errors import HoneloomError, MessageError
from honeloom.federated.frozen import folded, stacked
from honeloom.federated.messages import ERROR, Factors, TrainReply, TrainTask, digest_of, pack_scalars
from honeloom.ops.noise import uniform
from honeloom.types.federation import LocalJob, LocalPort

__all__ = ["ClientCore", "ClientMemory", "fresh_factors", "split_shared"]

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class ClientMemory:
    """What a client keeps between rounds: the frozen additions and their version, and the last round it was in."""

    version: int = 0
    round: int = 0
    frozen: dict[str, Pair] = field(default_factory=dict)


class ClientCore:
    """Handles tasks for one client.

    Parameters
    ----------
    name : str
        The client.
    port : LocalPort
        Its model and rows.
    memory : ClientMemory
        Kept between rounds; whoever runs the client stores it.
    """

    def __init__(self, name: str, port: LocalPort, memory: ClientMemory | None = None) -> None:
        self.name = name
        self.port = port
        self.memory = memory or ClientMemory()

    def handle(self, task: TrainTask) -> TrainReply:
        """Train as the task says; what goes wrong is told in the reply, for the others go on without this client."""
        try:
            return self._train(task)
        except HoneloomError as error:
            return TrainReply(
                task.experiment, task.round, self.name, version=self.memory.version,
                error=f"{type(error).__name__}: {error}"[:ERROR],
            )  # fmt: skip

    def _train(self, task: TrainTask) -> TrainReply:
        begun = time.monotonic()
        self._check(task)
        memory = self.memory
        if task.version != memory.version:
            if task.since not in (0, memory.version):
                raise MessageError(f"holds frozen additions of version {memory.version}, the task adds to {task.since}")
            before = {} if task.since == 0 else memory.frozen
            memory.frozen = folded(stacked(before, task.frozen))
            memory.version = task.version
        start, rest = self._start(task)
        frozen = stacked(memory.frozen, rest)
        scale = task.alpha / task.rank
        job = LocalJob(
            self.name, start, scale, frozen, task.trains, task.settings, int(task.settings["seed"]),
            f"{self.name}/{task.round}", task.correction,
        )  # fmt: skip
        result = self.port.train(job)
        memory.round = task.round
        metrics = {**result.metrics, "seconds": time.monotonic() - begun}
        if task.settings.get("uplink") == "scalars":
            return TrainReply(
                task.experiment, task.round, self.name, self.port.rows(self.name), memory.version, metrics,
                scalars=pack_scalars(result.scalars), digest=digest_of(result.factors),
            )  # fmt: skip
        return TrainReply(
            task.experiment, task.round, self.name, self.port.rows(self.name), memory.version, metrics,
            factors=result.factors,
        )  # fmt: skip

    def _check(self, task: TrainTask) -> None:
        if task.client != self.name:
            raise MessageError(f"a task for {task.client!r} came to {self.name!r}")
        if task.round < self.memory.round:
            raise MessageError(f"a task of round {task.round} came after round {self.memory.round}; it is dropped")
        for group in (task.shared, task.frozen, task.correction):
            for module, (b, a) in group.items():
                if self.port.modules.get(module) != (b.shape[0], a.shape[1]):
                    raise MessageError(f"module {module!r}: {tuple(b.shape)} x {tuple(a.shape)} does not fit the model")

    def _start(self, task: TrainTask) -> tuple[dict[str, Pair], dict[str, Pair]]:
        """Factors to train, and what of the shared ones is kept beside them."""
        if task.start == "fresh" or not task.shared:
            name = "shared" if task.alike else f"{self.name}/{task.round}"
            return fresh_factors(self.port.modules, task.rank, int(task.settings["seed"]), name), {}
        return split_shared(
            task.shared, self.port.modules, task.rank, task.alpha / task.rank, keep=task.start == "carry"
        )


def fresh_factors(modules: Mapping[str, tuple[int, int]], rank: int, seed: int, name: str) -> dict[str, Pair]:
    """New adapters as PEFT begins them: A uniform in +-1/sqrt(n) (Kaiming with a = sqrt 5), B zero.

    A smaller rank's A is the beginning of a larger one's, for the same name.
    """
    found = {}
    for module, (m, n) in modules.items():
        draws = uniform(seed, f"federated/fresh/{name}/{module}", rank * n).view(rank, n)
        found[module] = (torch.zeros(m, rank), ((2.0 * draws - 1.0) / math.sqrt(n)).float())
    return found


def split_shared(
    shared: Factors, modules: Mapping[str, tuple[int, int]], rank: int, scale: float, *, keep: bool
) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """Begin with the first `rank` columns of shared factors, whose scale is 1, and keep the others beside or not.

    Columns that are lacking, or zero in both factors, add nothing, and as zeros they could not be
    trained: their A is that of a fresh adapter, drawn by seed 0.
    """
    start, rest = {}, {}
    for module, (m, n) in modules.items():
        b, a = shared.get(module, (torch.zeros(m, 0), torch.zeros(0, n)))
        b, a = b.float(), a.float()
        mine_b, mine_a = b[:, :rank] / scale, a[:rank]
        if (lacking := rank - mine_b.shape[1]) > 0:
            _, more = fresh_factors({module: (m, n)}, rank, 0, "lacking")[module]
            mine_b = torch.cat([mine_b, torch.zeros(m, lacking)], dim=1)
            mine_a = torch.cat([mine_a, more[-lacking:]], dim=0)
        dead = ~(mine_b.any(dim=0) | mine_a.any(dim=1))
        if bool(dead.any()):
            mine_a = torch.where(dead[:, None], fresh_factors({module: (m, n)}, rank, 0, "lacking")[module][1], mine_a)
        start[module] = (mine_b.contiguous(), mine_a.contiguous())
        if keep and b.shape[1] > rank:
            rest[module] = (b[:, rank:].contiguous(), a[rank:].contiguous())
    return start, rest
