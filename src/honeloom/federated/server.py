"""The server's side of a round: who is asked, what they are sent, what is accepted, and what becomes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from honeloom.errors import HoneloomError, IncompatibleModelsError, MessageError
from honeloom.federated import scaffold
from honeloom.federated.aggregation.exactness import error_norms
from honeloom.federated.aggregation.warm import whole
from honeloom.federated.beginnings import Beginnings
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.federate_parts import ClientConfig
from honeloom.federated.messages import Factors, Manifest, TrainReply, TrainTask, decode_reply, encode
from honeloom.federated.rates import client_rates, drawn_deviations
from honeloom.federated.server_optimizer import ServerOptimizer
from honeloom.federated.shares import capped, kept_part, outliers
from honeloom.federated.state import ClientRecord, RoundRecord, ServerState
from honeloom.federated.uplinks import PoolUplink, Uplink, uplink_of
from honeloom.ops.lowrank import product_norm, stack_factors
from honeloom.ops.noise import keyed_uniform
from honeloom.registry import family, load_target
from honeloom.system import peak_rss
from honeloom.types.updates import Combined
from honeloom.types.views import plain

__all__ = ["ServerCore"]

Pair = tuple[torch.Tensor, torch.Tensor]
REASON = 600
"""Characters of a reason that are kept."""
LARGEST_SQUARE = 1e30
"""Of an update's norm."""


class ServerCore:
    """One federation's server, whatever carries its messages.

    Parameters
    ----------
    config : FederateConfig
        Settings.
    experiment : str
        Names the federation; replies of another are refused.
    modules : mapping
        Shape (m, n) of every module with an adapter; without adapters, of every tensor that is trained.
    state : ServerState, optional
        Where to go on.
    """

    def __init__(
        self, config: FederateConfig, experiment: str, modules: Mapping[str, tuple[int, int]],
        state: ServerState | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.experiment = experiment
        self.state = state or ServerState()
        self.members = {client.id: client for client in config.members()}
        self.begun = Beginnings(config, modules, self.state)
        self.how = self.begun.how
        self.uplink: Uplink = uplink_of(self.begun)
        self._rule: Callable[..., Combined] = family("aggregation").load(config.aggregation.type)
        self._settings = config.aggregation.model_dump(exclude={"type"}, exclude_none=True)
        self._optimizer = ServerOptimizer(config.server)
        self._replies: dict[str, TrainReply] = {}
        self._repeated: set[str] = set()
        self._record: RoundRecord | None = None
        self._secure: Any = None

    @property
    def opens(self) -> bool:
        """Whether the tasks that were last given out ask for what opens a secure sum."""
        return self._secure is not None and self._secure.phase == "reveal"

    @property
    def keeps_replies(self) -> bool:
        """Whether a reply is of use to an attempt that goes on with its round: masked ones are of none."""
        return not self.config.privacy.secagg

    def begin(self, opened: int = 0) -> dict[str, bytes]:
        """Begin the next round: the tasks of the clients that are asked, as bytes.

        Parameters
        ----------
        opened : int
            How often an earlier attempt asked for what opens this round's secure sum.
        """
        number = self.state.round + 1
        there = [client for client in self.members.values() if client.takes_part(number)]
        count = max(1, math.ceil(self.config.participation * len(there) - 1e-9)) if there else 0
        draws = keyed_uniform(self.config.seed, f"federated/asked/{number}", [c.id for c in there])
        asked = {there[i].id for i in sorted(range(len(there)), key=lambda i: (draws[i], there[i].id))[:count]}
        self._replies, self._repeated = {}, set()
        rates = self._rates([c.id for c in there if c.id in asked])
        self._record = RoundRecord(
            number, [ClientRecord(c.id, self.rank(c), lr=rates[c.id]) for c in there if c.id in asked]
        )  # fmt: skip
        if self.config.privacy.secagg:
            self._secure = load_target("honeloom.federated.secure_sum:SecureSum")(
                self.experiment, number, asked, self.config.pool_size, opened
            )
            return self._sent({record.id: self._words(record, "keys", {}) for record in self._record.clients})
        return self._sent({record.id: self._task(record) for record in self._record.clients})

    def proceed(self) -> dict[str, bytes]:
        """Further tasks of the round, once those before are answered; none where it has no more phases."""
        record = self._record
        assert record is not None  # a round was begun
        if self._secure is None or record.reason is not None or self._secure.phase == "done":
            return {}
        if self._secure.phase == "train":
            self._drop_strangers(record)
        try:
            words: Mapping[str, Any] = self._secure.advance()
        except HoneloomError as error:
            record.reason = str(error)
            return {}
        clients = {c.id: c for c in record.clients if c.id in words}
        if self._secure.phase != "train":
            return self._sent({n: self._words(c, self._secure.phase, words[n]) for n, c in clients.items()})
        shares = self._shares(list(clients.values()))
        for client, share in zip(clients.values(), shares, strict=True):
            client.share = share
        unit = self.config.lr_in(record.round)
        notes = {n: {"delivery": words[n], "share": c.share, "unit": unit} for n, c in clients.items()}
        return self._sent({n: replace(self._task(c), notes=notes[n]) for n, c in clients.items()})

    def _words(self, record: ClientRecord, phase: str, notes: Mapping[str, Any]) -> TrainTask:
        settings = {"threshold": self._secure.round.threshold, "attempt": self._secure.attempt}
        return TrainTask(
            self.experiment, self.state.round + 1, record.id, record.rank, self.begun.alpha(record.rank),
            self.how.start, settings=settings, phase=phase, notes=notes,
        )  # fmt: skip

    def _sent(self, tasks: Mapping[str, TrainTask]) -> dict[str, bytes]:
        """Tasks as bytes, which are counted."""
        found = {name: encode(task) for name, task in tasks.items()}
        for name, data in found.items():
            record = self._of(name)
            assert record is not None  # it was asked
            record.bytes_down += len(data)
        return found

    def rank(self, client: ClientConfig) -> int:
        """A client's rank in the round that is next."""
        return client.rank_in(self.state.round + 1, 8)

    def _rates(self, asked: Sequence[str]) -> dict[str, float]:
        """Learning rate of every client: that of the round, and as far from it as earlier rounds say."""
        rates, number = self.config.rates, self.state.round + 1
        base = self.config.lr_in(number)
        away: Mapping[str, float] = self.state.rates.deviation
        if rates.statistic == "random":
            away = drawn_deviations(asked, self.config.seed, number)
        least, most = rates.least or 0.0, rates.most or math.inf
        return client_rates({n: away.get(n, 0.0) for n in asked}, base, rates.spread * base, least=least, most=most)

    def _task(self, record: ClientRecord) -> TrainTask:
        config, number = self.config, self.state.round + 1
        settings = {
            "steps": config.local_steps, "batch_size": config.batch_size, "lr": record.lr, "seed": config.seed,
            "optimizer": config.optimizer.model_dump(), "max_grad_norm": config.max_grad_norm,
            "proximal": config.proximal, "scaffold": config.scaffold, "uplink": config.uplink,
            "method": config.method,
        }  # fmt: skip
        if config.uplink == "seed-pool":
            settings |= {"pool_size": config.pool_size, "secagg": config.privacy.secagg}
        if self._secure is not None and self._secure.attempt:
            settings["attempt"] = self._secure.attempt
        if config.privacy.dp is not None:
            settings["dp"] = config.privacy.dp.model_dump()
        if config.uplink == "scalars":
            settings["aggregation"] = config.aggregation.model_dump()
        return TrainTask(
            self.experiment, number, record.id, record.rank, self.begun.alpha(record.rank), self.how.start,
            self.how.trains(number), self.how.alike, settings=settings,
            correction=scaffold.correction(self.state, record.id), **self.uplink.carried(record),
        )  # fmt: skip

    def ingest(self, client: str, data: bytes) -> str:
        """Take a reply; returns its status, and the record says why it was refused. The first sound one counts."""
        record = self._of(client)
        words = self._secure is not None and self._secure.phase != "train"
        said = client in self._replies if self._secure is None else self._secure.has(client)
        if record is None or said:
            return "late"
        record.bytes_up += len(data)
        if words:
            return self._ingest_words(record, data)
        try:
            reply = decode_reply(data, self.uplink.manifest(record))
            self._check(record, reply)
            if reply.error is None and reply.round == self.state.round + 1:
                reply = self.uplink.complete(record, reply)
                self._check_factors(record, reply)
                record.norm = None if self._secure is not None else self._norm(record, reply)
        except MessageError as error:
            self.state.held[client] = 0  # what it holds by now is not known
            return self._refuse(record, str(error))
        if reply.round != self.state.round + 1:
            record.status, record.reason = "late", f"a reply of round {reply.round}"[:REASON]
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
        if self._secure is not None:
            self._secure.add(client, reply.arrays["masked"])
        # The first number of rows holds: nobody may weigh more later on.
        record.status, record.reason, record.rows = "ok", None, self.state.rows.setdefault(client, reply.rows)
        for name in ("loss_before", "loss_train", "loss_after", "seconds"):
            setattr(record, name, reply.metrics.get(name))
        return "ok"

    def _ingest_words(self, record: ClientRecord, data: bytes) -> str:
        """Take a client's part in a secure sum; whoever fails is left out, before or after it has trained."""
        try:
            reply = decode_reply(data, Manifest.of_notes(self._secure.most_bytes))
            self._check(record, reply)
            if reply.error is not None:
                raise MessageError(f"the client could not take part: {reply.error}")
            if reply.round != self.state.round + 1:
                return "late"
            self._secure.take(record.id, reply.notes)
        except MessageError as error:
            self.fail(record.id, str(error), status="rejected")
            return "rejected"
        if self._secure.phase == "keys":
            record.rows = self.state.rows.setdefault(record.id, reply.rows)
        return "ok"

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
        if record is not None and client in self._replies and self._secure is not None:
            record.reason = f"it sent its update, and did not help to open the sum: {plain(reason)[:REASON]}"
        elif record is not None and client not in self._replies:
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
        if reply.error is None and reply.rows < 1:
            raise MessageError("reply: it has no rows")

    def _check_factors(self, record: ClientRecord, reply: TrainReply) -> None:
        """They must be numbers; one that is not trained must be the one that was sent: the rule counts on it."""
        for module, pair in reply.factors.items():
            if not all(bool(torch.isfinite(t).all()) for t in pair):
                raise MessageError(f"reply: the factors of {module!r} hold NaN or infinity")
        trains = self.begun.trains
        if trains == "both":
            return
        begun, place = self.begun.of(record)[0], 1 if trains == "b" else 0
        for module, pair in reply.factors.items():
            if not torch.equal(pair[place].float(), begun[module][place]):
                raise MessageError(f"reply: {'BA'[place]} of {module!r} was to stay as it was sent, and it is another")

    def _norm(self, record: ClientRecord, reply: TrainReply) -> float:
        """Frobenius norm of what the client changed, over all modules; refused where float32 could not add.

        Without adapters it follows from the sums over seeds: directions of many numbers are orthogonal, nearly, and
        all of one length.
        """
        if self.config.method == "full":
            numbers = sum(m * n for m, n in self.begun.modules.values())
            squares = [numbers * float(reply.arrays["pool"].double().square().sum())]
        else:
            scale, (begun, _) = self.begun.scale(record.rank), self.begun.of(record)
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
        if self._secure is None:
            self._refuse_strangers(record)
            self._refuse_outliers(record)
        came = [self._replies[r.id] for r in record.clients if r.status == "ok"]
        if self._secure is not None:
            self._open(record)
        elif came and len(came) >= self.config.quorum * len(record.clients):
            self._aggregate(record, [r for r in record.clients if r.status == "ok"], came)
        self.state.round += 1
        record.sha256 = self.state.sha256()
        record.peak_rss_bytes = peak_rss()
        self._record, self._secure = None, None
        return record

    def _open(self, record: RoundRecord) -> None:
        """Take the masks off the sum of those that trained, and move by their mean."""
        assert isinstance(self.uplink, PoolUplink)  # the settings allow secure sums for it alone
        if record.reason is not None or len(self._secure.survivors) < self.config.quorum * len(record.clients):
            return
        try:
            sums = self._secure.total(self.config.lr_in(record.round))
        except HoneloomError as error:
            record.reason = str(error)
            return
        clients = [c for c in record.clients if c.id in self._secure.survivors]
        record.applied = True
        self._note_rates(clients, [])
        self.uplink.add(sums / math.fsum(c.share for c in clients))

    def _refuse_strangers(self, record: RoundRecord) -> None:
        """Without adapters the server has no weights to compare: most clients must have begun with the same."""
        if self.config.method != "full":
            return
        ok = [r for r in record.clients if r.status == "ok"]
        counts = Counter(self._replies[r.id].digest for r in ok)
        usual = {digest for digest, count in counts.items() if count * 2 > len(ok)}
        for client in ok:
            if (mine := self._replies[client.id].digest) not in usual:
                others = next(iter(usual), "no digest of most clients")
                self._refuse(client, f"it began with other weights than the others ({mine}, not {others})")

    def _drop_strangers(self, record: RoundRecord) -> None:
        """The same, while a secure sum can still be told to leave them out."""
        self._refuse_strangers(record)
        for client in record.clients:
            if client.status != "ok":
                self._secure.drop(client.id)

    def _refuse_outliers(self, record: RoundRecord) -> None:
        ok = [r for r in record.clients if r.status == "ok" and r.norm is not None]
        for place, reason in outliers([r.norm or 0.0 for r in ok], self.config.outlier, self.state.norm).items():
            self._refuse(ok[place], reason)

    def _aggregate(self, record: RoundRecord, clients: Sequence[ClientRecord], replies: Sequence[TrainReply]) -> None:
        shares = self._shares(clients)
        for client, share in zip(clients, shares, strict=True):
            client.share = share
        combined = self._combined(record, clients, replies, shares) if self.config.method == "lora" else {}
        if record.reason is not None:
            return
        record.applied = True
        self.state.norm = max(self.state.norm, *(c.norm or 0.0 for c in clients))
        self._note_rates(clients, replies)
        if self.config.scaffold:
            self._correct(clients, replies)
        if not isinstance(self.uplink, PoolUplink):
            self._move(combined)
        self.uplink.settle(clients, replies, shares)

    def _shares(self, clients: Sequence[ClientRecord]) -> list[float]:
        return capped([1 if self.config.weights == "equal" else c.rows for c in clients], self.config.max_share)

    def _combined(
        self, record: RoundRecord, clients: Sequence[ClientRecord], replies: Sequence[TrainReply],
        shares: Sequence[float],
    ) -> dict[str, Combined]:  # fmt: skip
        """The rule's aggregate of every module, and in the record how far it is from the sum of the updates."""
        rests = [self.begun.of(client)[1] for client in clients]
        combined, squares = {}, [0.0, 0.0]
        for module in self.begun.modules:
            parts = [
                kept_part(reply.factors[module], rest.get(module), self.begun.scale(c.rank), share)
                for c, reply, rest, share in zip(clients, replies, rests, shares, strict=True)
            ]
            try:
                combined[module] = self._rule(parts, **self._settings)
            except (IncompatibleModelsError, RuntimeError) as error:  # the latter: a decomposition that fails
                record.reason = f"module {module}: {error}"
                return {}
            norms = error_norms(combined[module], parts, seed=self.config.seed)
            record.errors[module] = norms.relative
            squares = [squares[0] + norms.difference**2, squares[1] + norms.target**2]
            record.rank = max(record.rank, whole(combined[module])[0].shape[1])
        if not all(bool(torch.isfinite(t).all()) for c in combined.values() for t in whole(c)):
            record.reason = "the aggregate is not finite"
        record.error = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
        return combined

    def _move(self, combined: Mapping[str, Combined]) -> None:
        """Take the aggregate over as the new state, through the server's optimizer."""
        state = self.state
        if self.how.start == "fresh":
            step = {module: whole(c) for module, c in combined.items()}
            state.frozen.add(_float(self._optimizer.step(None, step, state.moments)))
            return
        old = state.shared or self.begun.fresh(max(self.rank(client) for client in self.members.values()))
        new = {module: (c.b, c.a) for module, c in combined.items()}
        state.shared = _float(self._optimizer.step(old, new, state.moments))
        residual = {module: c.residual for module, c in combined.items() if c.residual is not None}
        if residual:
            state.frozen.add(_float(residual))

    def _correct(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply]) -> None:
        everybody = len([c for c in self.members.values() if c.takes_part(self.state.round + 1)])
        ways = [
            (client.id, self.config.local_steps * client.lr, self.begun.of(client)[0], reply.factors)
            for client, reply in zip(clients, replies, strict=True)
        ]
        scaffold.correct(self.state, ways, everybody)

    def _note_rates(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply]) -> None:
        rates = self.config.rates
        if rates.statistic in ("none", "random"):
            return
        apart = self._apart(clients, replies) if rates.statistic == "difference" else {}
        losses = {c.id: c.loss_train for c in clients if c.loss_train is not None}
        self.state.rates.note(rates.statistic, losses, apart, robust=rates.robust)

    def _apart(self, clients: Sequence[ClientRecord], replies: Sequence[TrainReply]) -> dict[str, float]:
        """How far each client's way is from the mean way, at no further bytes.

        Of adapters, the norms over tensors of how factors moved, added up; without them, the sums over
        seeds stand for the tensors.
        """
        if self.config.method == "full":
            ways = [[reply.arrays["pool"].double()] for reply in replies]
        else:
            begun = [self.begun.of(client)[0] for client in clients]
            ways = [
                [t.double() - s for m, pair in reply.factors.items() for t, s in zip(pair, start[m], strict=True)]
                for reply, start in zip(replies, begun, strict=True)
            ]
        means = [torch.stack(tensors).mean(dim=0) for tensors in zip(*ways, strict=True)]
        return {
            client.id: sum(float((t - mean).norm()) for t, mean in zip(way, means, strict=True))
            for client, way in zip(clients, ways, strict=True)
        }


def _float(pairs: Factors) -> dict[str, Pair]:
    return {module: (b.float().contiguous(), a.float().contiguous()) for module, (b, a) in pairs.items()}
