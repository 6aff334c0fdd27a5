"""The server's side of a round: who is asked, what they are sent, what is accepted, and what becomes of it."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from honeloom.errors import IncompatibleModelsError, MessageError
from honeloom.federated.aggregation.exactness import error_norms
from honeloom.federated.aggregation.warm import whole
from honeloom.federated.client import fresh_factors, split_shared
from honeloom.federated.continuation import Continuation, continuation_of
from honeloom.federated.federate_config import ClientConfig, FederateConfig
from honeloom.federated.frozen import FrozenAdditions, stacked
from honeloom.federated.messages import (
    Factors,
    Manifest,
    TrainReply,
    TrainTask,
    decode_reply,
    digest_of,
    encode,
    unpack_scalars,
)
from honeloom.federated.server_optimizer import ServerOptimizer
from honeloom.ops.lowrank import product_norm, stack_factors
from honeloom.ops.noise import keyed_uniform
from honeloom.registry import family
from honeloom.system import peak_rss
from honeloom.tuning.zeroth_order import ZerothOrder, step_seeds
from honeloom.types.updates import Combined, Part
from honeloom.types.views import plain

__all__ = ["ClientRecord", "RoundRecord", "ServerCore", "ServerState", "capped", "kept_part", "outliers"]

Pair = tuple[torch.Tensor, torch.Tensor]
FEWEST_TO_JUDGE = 3
"""Updates from which on one of them can be called an outlier; fewer are compared with those of earlier rounds."""
REASON = 600
"""Characters of a reason that are kept."""
LARGEST_SQUARE = 1e30
"""Of an update's norm."""


@dataclass(slots=True)
class ClientRecord:
    """What a round had of a client; status is ok, late, rejected or absent."""

    id: str
    rank: int
    status: str = "absent"
    reason: str | None = None
    rows: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    lr: float = 0.0
    norm: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float | None = None


@dataclass(slots=True)
class RoundRecord:
    """What a round did.

    Attributes
    ----------
    round : int
        From 1.
    applied : bool
        False where too few clients replied in time, or their updates could not be combined: nothing changed.
    reason : str or None
        Why they could not.
    error : float or None
        Relative error of the aggregate, over all modules; None where nothing was aggregated.
    errors : dict
        The same by module.
    rank : int
        Largest rank of what was aggregated.
    seconds, server_seconds : float
        Of the whole round, and of the server's own work in it: checks, norms, aggregation, files.
    peak_rss_bytes : int
        Of the server's process so far.
    sha256 : str
        Of the state after the round.
    """

    round: int
    clients: list[ClientRecord]
    applied: bool = False
    reason: str | None = None
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    rank: int = 0
    seconds: float = 0.0
    server_seconds: float = 0.0
    peak_rss_bytes: int = 0
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a line of rounds.jsonl."""
        return asdict(self)


@dataclass(slots=True)
class ServerState:
    """All that a server must remember between rounds.

    Attributes
    ----------
    round : int
        Rounds that are done.
    shared : dict
        Where clients begin, by module, scale 1; empty before the first round and where they begin anew.
    frozen : FrozenAdditions
        To the base; what clients hold beside what they train.
    control : dict
        SCAFFOLD's correction of the server.
    moments : dict
        Of the server's optimizer.
    held : dict
        Which version of the frozen additions every client has.
    corrections : dict
        SCAFFOLD's corrections of the clients.
    rows : dict
        How many rows every client said it has when it first replied.
    norm : float
        Largest norm of an update that was aggregated.
    """

    round: int = 0
    shared: dict[str, Pair] = field(default_factory=dict)
    frozen: FrozenAdditions = field(default_factory=FrozenAdditions)
    control: dict[str, Pair] = field(default_factory=dict)
    moments: dict[str, Pair] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    corrections: dict[str, dict[str, Pair]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    norm: float = 0.0

    def total(self) -> dict[str, Pair]:
        """The whole update of the base so far, as stacked factors."""
        return stacked(self.shared, self.frozen.total())

    def sha256(self) -> str:
        """Of the whole update: module names, shapes and bytes."""
        digest = hashlib.sha256()
        for module, pair in sorted(self.total().items()):
            for tensor in pair:
                digest.update(f"{module}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class ServerCore:
    """One federation's server, whatever carries its messages.

    Parameters
    ----------
    config : FederateConfig
        Settings.
    experiment : str
        Names the federation; replies of another are refused.
    modules : mapping
        Shape (m, n) of every module with an adapter.
    state : ServerState, optional
        Where to go on.
    """

    def __init__(
        self, config: FederateConfig, experiment: str, modules: Mapping[str, tuple[int, int]],
        state: ServerState | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.experiment = experiment
        self.modules = dict(sorted(modules.items()))
        self.state = state or ServerState()
        self.members = {client.id: client for client in config.members()}
        self.how: Continuation = continuation_of(config.aggregation.type, reset=config.starts == "reset")
        self._rule: Callable[..., Combined] = family("aggregation").load(config.aggregation.type)
        self._settings = config.aggregation.model_dump(exclude={"type"}, exclude_none=True)
        self._optimizer = ServerOptimizer(config.server)
        self._replies: dict[str, TrainReply] = {}
        self._repeated: set[str] = set()
        self._record: RoundRecord | None = None

    def begin(self) -> dict[str, bytes]:
        """Begin the next round: the tasks of the clients that are asked, as bytes."""
        number = self.state.round + 1
        there = [client for client in self.members.values() if client.takes_part(number)]
        count = max(1, math.ceil(self.config.participation * len(there) - 1e-9)) if there else 0
        draws = keyed_uniform(self.config.seed, f"federated/asked/{number}", [c.id for c in there])
        asked = {there[i].id for i in sorted(range(len(there)), key=lambda i: (draws[i], there[i].id))[:count]}
        self._replies, self._repeated = {}, set()
        self._record = RoundRecord(
            number, [ClientRecord(c.id, self.rank(c), lr=self.config.lr_in(number)) for c in there if c.id in asked]
        )
        tasks = {record.id: encode(self._task(record)) for record in self._record.clients}
        for record in self._record.clients:
            record.bytes_down = len(tasks[record.id])
        return tasks

    def rank(self, client: ClientConfig) -> int:
        """A client's rank in the round that is next."""
        return client.rank_in(self.state.round + 1, 8)

    def _task(self, record: ClientRecord) -> TrainTask:
        config, version = self.config, self.state.frozen.version
        since, frozen = self.state.frozen.after(self.state.held.get(record.id, 0))
        return TrainTask(
            self.experiment, self.state.round + 1, record.id, record.rank, self._alpha(record.rank), self.how.start,
            self.how.trains(self.state.round + 1), self.how.alike, since, version,
            settings={
                "steps": config.local_steps, "batch_size": config.batch_size, "lr": record.lr, "seed": config.seed,
                "optimizer": config.optimizer.model_dump(), "max_grad_norm": config.max_grad_norm,
                "proximal": config.proximal, "scaffold": config.scaffold, "uplink": config.uplink,
            },
            shared=self._download(record.rank), frozen=frozen, correction=self._correction(record.id),
        )  # fmt: skip

    def _download(self, rank: int) -> dict[str, Pair]:
        """Shared factors as a client needs them: all columns, or no more than it trains."""
        if self.how.start == "carry":
            return self.state.shared
        return {name: (b[:, :rank].contiguous(), a[:rank].contiguous()) for name, (b, a) in self.state.shared.items()}

    def _alpha(self, rank: int) -> float:
        return self.config.alpha if self.config.alpha is not None else 2.0 * rank

    def ingest(self, client: str, data: bytes) -> str:
        """Take a reply; returns its status, and the record says why it was refused. The first sound one counts."""
        record = self._of(client)
        if record is None or client in self._replies:
            return "late"
        record.bytes_up += len(data)
        try:
            reply = decode_reply(data, self._manifest(record))
            if reply.scalars and reply.round == self.state.round + 1:
                reply = replace(reply, factors=self._replayed(record, reply))
            self._check(record, reply)
            record.norm = self._norm(record, reply) if reply.factors else None
        except MessageError as error:
            self.state.held[client] = 0  # what it holds by now is not known
            return self._refuse(record, str(error))
        if reply.round != self.state.round + 1:
            record.status, record.reason = "late", f"a reply of round {reply.round}"
            return "late"
        if reply.error is not None:
            lost = self.state.held.get(client, 0) not in (0, reply.version)  # its process began anew
            self.state.held[client] = 0
            if lost and client not in self._repeated:
                self._repeated.add(client)
                return "again"
            return self._refuse(record, f"the client could not train: {reply.error}")
        self.state.held[client] = reply.version
        self._replies[client] = reply
        # The first number of rows holds: nobody may weigh more later on.
        record.status, record.reason, record.rows = "ok", None, self.state.rows.setdefault(client, reply.rows)
        for name in ("loss_before", "loss_after", "seconds"):
            setattr(record, name, reply.metrics.get(name))
        return "ok"

    def _manifest(self, record: ClientRecord) -> Manifest:
        if self.config.uplink == "tensors":
            return Manifest.of(self.modules, record.rank)
        mezo: Any = self.config.optimizer
        return Manifest.of_scalars(self.modules, record.rank, self.config.local_steps * mezo.directions)

    def _replayed(self, record: ClientRecord, reply: TrainReply) -> dict[str, Pair]:
        """The factors that a client's scalars lead to from where it began: seeds follow from client, round and step."""
        mezo: Any = self.config.optimizer
        factors = {m: (b.clone(), a.clone()) for m, (b, a) in self._begun(record)[0].items()}
        trains = self.how.trains(reply.round)
        moved = {
            f"{module}|{name}": pair[place]
            for module, pair in factors.items()
            for place, name in enumerate("ba")
            if trains in ("both", name) and (mezo.perturb == "all" or name == "b")
        }
        stepper = ZerothOrder(moved, mu=mezo.mu, kind=mezo.direction)
        scalars = unpack_scalars(reply.scalars).reshape(self.config.local_steps, mezo.directions)
        for step, mine in enumerate(scalars.tolist()):
            seeds = step_seeds(self.config.seed, f"{record.id}/{reply.round}", step, mezo.directions)
            stepper.replay(list(zip(seeds, mine, strict=True)), record.lr)
        if digest_of(factors) != reply.digest:
            raise MessageError("reply: its scalars do not lead to the factors that it says it has")
        return factors

    def again(self, client: str) -> bytes:
        """The task of a client that has lost what it held, with all that it needs."""
        record = self._of(client)
        assert record is not None  # it was asked
        data = encode(self._task(record))
        record.bytes_down += len(data)
        return data

    def fail(self, client: str, reason: str, *, status: str = "absent") -> None:
        """Note that a client did not reply, and why."""
        record = self._of(client)
        if record is not None and client not in self._replies:
            record.status, record.reason = status, plain(reason)[:REASON]
            self.state.held[client] = 0  # it may have taken the task in, or come back without a memory

    def _of(self, client: str) -> ClientRecord | None:
        clients = self._record.clients if self._record else []
        return next((record for record in clients if record.id == client), None)

    def _refuse(self, record: ClientRecord, reason: str) -> str:
        record.status, record.reason = "rejected", plain(reason)[:REASON]
        return "rejected"

    def _check(self, record: ClientRecord, reply: TrainReply) -> None:
        if reply.experiment != self.experiment:
            raise MessageError(f"reply: of another federation ({reply.experiment[:40]!r})")
        if reply.client != record.id:
            raise MessageError(f"reply: {record.id} answered as {reply.client[:64]!r}")
        for module, pair in reply.factors.items():
            if not all(bool(torch.isfinite(t).all()) for t in pair):
                raise MessageError(f"reply: the factors of {module!r} hold NaN or infinity")
        self._check_fixed(record, reply)
        if reply.error is None and reply.rows < 1:
            raise MessageError("reply: it has no rows")

    def _check_fixed(self, record: ClientRecord, reply: TrainReply) -> None:
        """A factor that is not trained must be the one that was sent: the rule counts on it."""
        trains = self.how.trains(self.state.round + 1)
        if trains == "both" or not reply.factors:
            return
        begun, place = self._begun(record)[0], 1 if trains == "b" else 0
        for module, pair in reply.factors.items():
            if not torch.equal(pair[place].float(), begun[module][place]):
                raise MessageError(f"reply: {'BA'[place]} of {module!r} was to stay as it was sent, and it is another")

    def _begun(self, record: ClientRecord) -> tuple[dict[str, Pair], dict[str, Pair]]:
        """What a client began with, as it computed it: trained factors, and what it kept frozen beside them."""
        scale = self._alpha(record.rank) / record.rank
        if self.how.start == "fresh" or not self.state.shared:
            name = "shared" if self.how.alike else f"{record.id}/{self.state.round + 1}"
            return fresh_factors(self.modules, record.rank, self.config.seed, name), {}
        shared = self._download(record.rank)
        return split_shared(shared, self.modules, record.rank, scale, keep=self.how.start == "carry")

    def _norm(self, record: ClientRecord, reply: TrainReply) -> float:
        """Frobenius norm of what the client changed, over all modules; refused where float32 could not add."""
        scale = self._alpha(record.rank) / record.rank
        begun, _ = self._begun(record)
        squares = [
            product_norm(*stack_factors([(*pair, scale), (*begun[module], -scale)])) ** 2
            for module, pair in reply.factors.items()
        ]
        if not math.fsum(squares) < LARGEST_SQUARE:
            raise MessageError("reply: its update is too large for float32")
        return math.sqrt(math.fsum(squares))

    def finish(self) -> RoundRecord:
        """Aggregate what came; the next round is due whether or not it sufficed."""
        record = self._record
        assert record is not None  # a round was begun
        self._refuse_outliers(record)
        came = [self._replies[r.id] for r in record.clients if r.status == "ok"]
        if came and len(came) >= self.config.quorum * len(record.clients):
            self._aggregate(record, [r for r in record.clients if r.status == "ok"], came)
        self.state.round += 1
        record.sha256 = self.state.sha256()
        record.peak_rss_bytes = peak_rss()
        self._record = None
        return record

    def _refuse_outliers(self, record: RoundRecord) -> None:
        ok = [r for r in record.clients if r.status == "ok" and r.norm is not None]
        for place, reason in outliers([r.norm or 0.0 for r in ok], self.config.outlier, self.state.norm).items():
            self._refuse(ok[place], reason)

    def _aggregate(self, record: RoundRecord, clients: Sequence[ClientRecord], replies: Sequence[TrainReply]) -> None:
        shares = capped([1 if self.config.weights == "equal" else c.rows for c in clients], self.config.max_share)
        rests = [self._begun(client)[1] for client in clients]
        combined, squares = {}, [0.0, 0.0]
        for module in self.modules:
            parts = [
                kept_part(reply.factors[module], rest.get(module), self._alpha(c.rank) / c.rank, share)
                for c, reply, rest, share in zip(clients, replies, rests, shares, strict=True)
            ]
            try:
                combined[module] = self._rule(parts, **self._settings)
            except (IncompatibleModelsError, RuntimeError) as error:  # the latter: a decomposition that fails
                record.reason = f"module {module}: {error}"
                return
            norms = error_norms(combined[module], parts, seed=self.config.seed)
            record.errors[module] = norms.relative
            squares = [squares[0] + norms.difference**2, squares[1] + norms.target**2]
            record.rank = max(record.rank, whole(combined[module])[0].shape[1])
        if not all(bool(torch.isfinite(t).all()) for c in combined.values() for t in whole(c)):
            record.reason = "the aggregate is not finite"
            return
        record.applied = True
        record.error = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
        self.state.norm = max(self.state.norm, *(c.norm or 0.0 for c in clients))
        if self.config.scaffold:
            self._correct(clients, replies)
        self._move(combined)

    def _move(self, combined: Mapping[str, Combined]) -> None:
        """Take the aggregate over as the new state, through the server's optimizer."""
        state = self.state
        if self.how.start == "fresh":
            step = {module: whole(c) for module, c in combined.items()}
            state.frozen.add(_float(self._optimizer.step(None, step, state.moments)))
            return
        old = state.shared or fresh_factors(self.modules, self._largest(), self.config.seed, "shared")
        new = {module: (c.b, c.a) for module, c in combined.items()}
        state.shared = _float(self._optimizer.step(old, new, state.moments))
        residual = {module: c.residual for module, c in combined.items() if c.residual is not None}
        if residual:
            state.frozen.add(_float(residual))

    def _largest(self) -> int:
        return max(self.rank(client) for client in self.members.values())

    def _correction(self, client: str) -> dict[str, Pair]:
        """SCAFFOLD: what a client adds to its gradients, c - c_i."""
        mine = self.state.corrections.get(client, {})
        return {module: _minus(c, mine.get(module)) for module, c in self.state.control.items()}

    def _correct(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply]) -> None:
        """SCAFFOLD: c_i becomes c_i - c + (start - end) / (steps x lr), and c moves by the mean of the changes.

        All of it follows from what the server has sent and got, so that clients need not keep or send corrections.
        """
        number = self.state.round + 1
        everybody = len([c for c in self.members.values() if c.takes_part(number)])
        moves: dict[str, Pair] = {}
        for client, reply in zip(clients, replies, strict=True):
            unit, (begun, _) = self.config.local_steps * client.lr, self._begun(client)
            mine = self.state.corrections.setdefault(client.id, {})
            for module, after in reply.factors.items():
                moved = [(s - f) / unit for s, f in zip(begun[module], after, strict=True)]
                change = _minus((moved[0], moved[1]), self.state.control.get(module))
                mine[module] = _plus(mine.get(module), change)
                moves[module] = _plus(moves.get(module), change)
        for module, (b, a) in moves.items():
            self.state.control[module] = _plus(self.state.control.get(module), (b / everybody, a / everybody))


def _plus(one: Pair | None, other: Pair) -> Pair:
    return other if one is None else (one[0] + other[0], one[1] + other[1])


def _minus(one: Pair, other: Pair | None) -> Pair:
    return one if other is None else (one[0] - other[0], one[1] - other[1])


def outliers(norms: Sequence[float], times: float, earlier: float = 0.0) -> dict[int, str]:
    """Places of norms that are over `times` the median of the others, and why.

    Fewer than three are compared with the largest of earlier rounds. Where that, or most of the
    others, is 0, nothing can be said.
    """
    found = {}
    for place, norm in enumerate(norms):
        others = [other for k, other in enumerate(norms) if k != place]
        usual = statistics.median(others) if len(norms) >= FEWEST_TO_JUDGE else earlier
        if norm > times * usual > 0:
            found[place] = f"norm {norm:.3g} of its update is over {times:g} times {usual:.3g}"
    return found


def capped(rows: Sequence[int], most: float) -> list[float]:
    """Shares by rows, none over `most` (or all equal, if that is too little); the others get what is cut off."""
    shares = [n / sum(rows) for n in rows]
    if most * len(rows) <= 1:
        return [1 / len(rows)] * len(rows)
    fixed: set[int] = set()
    while over := {k for k, share in enumerate(shares) if share > most + 1e-12} - fixed:
        fixed |= over
        left = sum(n for k, n in enumerate(rows) if k not in fixed)
        shares = [most if k in fixed else n / left * (1 - most * len(fixed)) for k, n in enumerate(rows)]
    return shares


def kept_part(trained: Pair, rest: Pair | None, scale: float, share: float) -> Part:
    """A client's update beside what is frozen for everybody: what it trained, and what it kept of the aggregate."""
    b, a = trained[0].float(), trained[1].float()
    if rest is None or not rest[0].shape[1]:
        return Part(b, a, scale, share)
    return Part(torch.cat([b * scale, rest[0]], dim=1), torch.cat([a, rest[1]], dim=0), 1.0, share)


def _float(pairs: Factors) -> dict[str, Pair]:
    return {module: (b.float().contiguous(), a.float().contiguous()) for module, (b, a) in pairs.items()}
