"""A client: from a task to a reply, whatever carries the two."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from honeloom.errors import HoneloomError, MessageError
from honeloom.federated.continuation import continuation_of
from honeloom.federated.frozen import folded, stacked
from honeloom.federated.messages import ERROR, Factors, TrainReply, TrainTask, decode_task, digest_of, encode
from honeloom.federated.scalars import SeedPool, moved_along, moves_of, replayed
from honeloom.federated.shares import kept_part
from honeloom.ops.noise import uniform
from honeloom.registry import family, load_target
from honeloom.tuning.config import MezoConfig
from honeloom.tuning.zeroth_order import step_seeds
from honeloom.types.federation import LocalJob, LocalPort, LocalResult

__all__ = ["WORDS", "ClientCore", "ClientMemory", "fresh_factors", "split_shared"]

Pair = tuple[torch.Tensor, torch.Tensor]
WORDS = ("keys", "shares", "reveal")
"""Phases of a secure sum in which nothing is trained."""


@dataclass(slots=True)
class ClientMemory:
    """What a client keeps: frozen additions or shared factors, their version, its last round, secrets of a round.

    `sent` is its last reply where that was noised: asked again, it gives the same, for noise that is drawn twice
    can be averaged out.
    """

    version: int = 0
    round: int = 0
    frozen: dict[str, Pair] = field(default_factory=dict)
    shared: dict[str, Pair] = field(default_factory=dict)
    secrets: dict[str, Any] = field(default_factory=dict)
    sent: bytes = b""


class ClientCore:
    """Handles tasks for one client.

    Parameters
    ----------
    name : str
        The client.
    port : LocalPort or None
        Its model and rows; None where it only answers words of a protocol beside training.
    memory : ClientMemory
        Kept between rounds; whoever runs the client stores it.
    """

    def __init__(self, name: str, port: LocalPort | None, memory: ClientMemory | None = None) -> None:
        self.name = name
        self.port = port
        self.memory = memory or ClientMemory()

    def reply_to(self, data: bytes) -> bytes:
        """A task's reply, both as bytes; a noised one is given once, and the same again."""
        task, memory = decode_task(data), self.memory
        noised = bool(task.settings.get("dp"))
        if noised and memory.sent and memory.round == task.round:
            return memory.sent
        reply = self.handle(task)
        memory.sent = encode(reply) if noised and reply.error is None else b""
        return memory.sent or encode(reply)

    def handle(self, task: TrainTask) -> TrainReply:
        """Train as the task says; what goes wrong is told in the reply, for the others go on without this client."""
        try:
            self._check(task)
            answer = {"train": self._train, "curvature": self._measure, **dict.fromkeys(WORDS, self._words)}
            if task.phase not in answer:
                raise MessageError(f"a task of phase {task.phase!r:.40}; this version knows {', '.join(answer)}")
            return answer[task.phase](task)
        except HoneloomError as error:
            return TrainReply(
                task.experiment, task.round, self.name, version=self.memory.version,
                error=f"{type(error).__name__}: {error}"[:ERROR],
            )  # fmt: skip

    def _words(self, task: TrainTask) -> TrainReply:
        """Say what a secure sum needs."""
        self.memory.secrets, said = load_target("honeloom.federated.secure_sum:answered")(self.memory.secrets, task)
        self.memory.round = task.round
        rows = self.port.rows(self.name) if self.port is not None else 1
        return TrainReply(task.experiment, task.round, self.name, rows, self.memory.version, notes=said)

    def _measure(self, task: TrainTask) -> TrainReply:
        """Tell what this client's loss bears, where training begins."""
        port, seed = self.port, int(task.settings["seed"])
        assert port is not None  # whoever asks for it gives a model
        start, _ = _start(self.memory, task, port.modules)
        job = LocalJob(
            self.name, start, task.alpha / task.rank, {}, task.trains, task.settings, seed, f"{self.name}/curvature"
        )
        return TrainReply(
            task.experiment, task.round, self.name, port.rows(self.name), self.memory.version, port.measure(job)
        )

    def _train(self, task: TrainTask) -> TrainReply:
        begun, port = time.monotonic(), self.port
        assert port is not None  # whoever asks a client to train gives it a model
        keep_up(self.memory, task, port.modules)
        start, rest = _start(self.memory, task, port.modules)
        order, settings = f"{self.name}/{task.round}", task.settings
        if settings.get("attempt"):  # a sum of these steps was opened: others are taken
            order += f"/{settings['attempt']}"
        job = LocalJob(
            self.name, start, task.alpha / task.rank, stacked(self.memory.frozen, rest), task.trains, settings,
            int(settings["seed"]), order, task.correction, _seeds(settings, order), _moved(task),
        )  # fmt: skip
        result = port.train(job)
        self.memory.round = task.round
        metrics = dict(result.metrics)
        if not settings.get("dp"):  # how long it took tells how many rows were drawn
            metrics["seconds"] = time.monotonic() - begun
        told = _told(settings, order, start, result)
        if settings.get("secagg"):
            sums = told["arrays"]["pool"].double().numpy()
            mask = load_target("honeloom.federated.secure_sum:masked")
            self.memory.secrets, hidden = mask(self.memory.secrets, task, sums)
            told["arrays"] = {"masked": hidden}
        return TrainReply(
            task.experiment, task.round, self.name, port.rows(self.name), self.memory.version, metrics, **told
        )

    def _check(self, task: TrainTask) -> None:
        if task.client != self.name:
            raise MessageError(f"a task for {task.client!r} came to {self.name!r}")
        if task.round < self.memory.round:
            raise MessageError(f"a task of round {task.round} came after round {self.memory.round}; it is dropped")
        for group in (task.shared, task.frozen, task.correction):
            for module, (b, a) in group.items():
                if self.port is None or self.port.modules.get(module) != (b.shape[0], a.shape[1]):
                    raise MessageError(f"module {module!r}: {tuple(b.shape)} x {tuple(a.shape)} does not fit the model")


def _start(
    memory: ClientMemory, task: TrainTask, modules: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """Factors to train, and what of the shared ones is kept beside them."""
    settings = task.settings
    if settings.get("method") == "full":
        return {}, {}
    shared = memory.shared if task.follows else task.shared
    if settings.get("uplink") == "seed-pool":
        start = fresh_factors(modules, task.rank, int(settings["seed"]), "shared")
        if "pool" not in task.arrays:
            return start, {}
        pool = SeedPool(int(settings["pool_size"]), int(settings["seed"]))
        mezo, sums = MezoConfig(**settings["optimizer"]), task.arrays["pool"].numpy()
        return moved_along(start, sums, pool=pool, mezo=mezo, trains=task.trains), {}
    if task.start == "fresh" or not shared:
        name = "shared" if task.alike else f"{task.client}/{task.round}"
        return fresh_factors(modules, task.rank, int(settings["seed"]), name), {}
    return split_shared(shared, modules, task.rank, task.alpha / task.rank, keep=task.start == "carry")


def keep_up(memory: ClientMemory, task: TrainTask, modules: Mapping[str, tuple[int, int]]) -> None:
    """Bring what a client holds to the version of a task.

    Raises
    ------
    MessageError
        It holds another version than the task goes on from, or ends elsewhere than the server.
    """
    if task.version == memory.version:
        return
    if task.since not in (0, memory.version):
        raise MessageError(f"holds version {memory.version} of what is shared, and the task adds to {task.since}")
    if not task.follows:
        memory.frozen = folded(stacked({} if task.since == 0 else memory.frozen, task.frozen))
        memory.version = task.version
        return
    held = memory.shared if task.since else dict(task.shared)
    memory.version, memory.shared = 0, {}
    found = _followed(held, task, modules)
    if digest_of(found) != task.digest:
        raise MessageError("what everybody's scalars lead to is not what the server has")
    memory.version, memory.shared = task.version, found


def _followed(shared: dict[str, Pair], task: TrainTask, modules: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """Do in every round of the task's log what the server did: replay each client, and average by the rule."""
    if not task.log:
        return shared
    settings, scale = task.settings, task.alpha / task.rank
    mezo, seed = MezoConfig(**settings["optimizer"]), int(settings["seed"])
    rule = {**settings["aggregation"]}
    average, how = family("aggregation").load(rule["type"]), continuation_of(rule.pop("type"))
    for move in moves_of(task.log, task.arrays["log"], int(settings["steps"]), mezo.directions):
        begun = fresh_factors(modules, task.rank, seed, "shared")
        if shared:
            begun, _ = split_shared(shared, modules, task.rank, scale, keep=False)
        ends = [
            replayed(
                begun, scalars, mezo=mezo, seed=seed, order=f"{client}/{move.round}", lr=lr,
                trains=how.trains(move.round),
            )
            for (client, _, lr), scalars in zip(move.clients, move.scalars, strict=True)
        ]  # fmt: skip
        shared = {}
        for module in modules:
            shares = (share for _, share, _ in move.clients)
            parts = [kept_part(end[module], None, scale, share) for end, share in zip(ends, shares, strict=True)]
            found = average(parts, **{name: value for name, value in rule.items() if value is not None})
            shared[module] = (found.b.float().contiguous(), found.a.float().contiguous())
    return shared


def _seeds(settings: Mapping[str, Any], order: str) -> tuple[tuple[int, ...], ...]:
    """Of the directions of every zeroth-order step; none for others."""
    if settings["optimizer"]["type"] != "mezo":
        return ()
    seed, steps, directions = int(settings["seed"]), int(settings["steps"]), settings["optimizer"]["directions"]
    if settings.get("uplink") != "seed-pool":
        return tuple(tuple(step_seeds(seed, order, step, directions)) for step in range(steps))
    pool = SeedPool(int(settings["pool_size"]), seed)
    known = pool.seeds()
    return tuple(tuple(known[j] for j in mine) for mine in pool.picks(order, steps, directions).tolist())


def _moved(task: TrainTask) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Without adapters: seeds along which the base itself is moved, and by how much."""
    if task.settings.get("method") != "full" or "pool" not in task.arrays:
        return (), ()
    pool = SeedPool(int(task.settings["pool_size"]), int(task.settings["seed"]))
    return tuple(pool.seeds()), tuple(task.arrays["pool"].tolist())


def _told(settings: Mapping[str, Any], order: str, start: Factors, result: LocalResult) -> dict[str, Any]:
    """What the reply carries of where the client went."""
    uplink = settings.get("uplink", "tensors")
    if uplink == "tensors":
        return {"factors": result.factors}
    scalars = np.array(result.scalars, dtype=np.float32)
    if uplink == "scalars":
        return {"arrays": {"scalars": torch.from_numpy(scalars.reshape(-1))}, "digest": digest_of(result.factors)}
    pool = SeedPool(int(settings["pool_size"]), int(settings["seed"]))
    sums = torch.from_numpy(pool.sums(order, scalars, float(settings["lr"]))).float()
    return {"arrays": {"pool": sums}, "digest": result.digest or digest_of(start)}


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
