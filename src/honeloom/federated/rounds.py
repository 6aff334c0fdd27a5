"""The loop over rounds, and the engine that needs no network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from honeloom.errors import HoneloomError
from honeloom.federated.client import ClientCore, ClientMemory
from honeloom.federated.frozen import Pair
from honeloom.federated.server import ServerCore
from honeloom.federated.state import RoundRecord, ServerState
from honeloom.federated.store import RoundStore

__all__ = ["Engine", "InlineEngine", "Silence", "run_rounds"]

MOST_EMPTY = 3
"""Rounds in a row without a quorum after which a federation is given up."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Why there is no reply of a client: it is not there, was too slow, or failed."""

    reason: str
    status: Literal["absent", "late", "rejected"] = "absent"


class Engine(Protocol):
    """Carries tasks to clients and their replies back."""

    def exchange(
        self, tasks: Mapping[str, bytes], deadline: float, needed: int
    ) -> Iterator[tuple[str, bytes | Silence]]:
        """Yield every reply that comes within `deadline` seconds, and why others did not.

        Without `needed` of the clients a round is of no use, so that it is worth waiting for them.
        """

    def restore(self, state: ServerState) -> None:
        """Bring clients of an engine that has just begun, and what the state says that they hold, together."""


class InlineEngine:
    """Clients of this process, one after the other; messages still take their form on the wire.

    Parameters
    ----------
    clients : mapping
        By id.
    """

    def __init__(self, clients: Mapping[str, ClientCore]) -> None:
        self.clients = clients
        self._additions: tuple[int, dict[str, Pair]] = (0, {})

    def exchange(
        self, tasks: Mapping[str, bytes], deadline: float, needed: int
    ) -> Iterator[tuple[str, bytes | Silence]]:
        """Yield the replies in the order of the tasks; there is nothing to wait for."""
        for name, data in tasks.items():
            reply = self.clients[name].reply_to(data)
            self._share(self.clients[name].memory)
            yield name, reply

    def _share(self, memory: ClientMemory) -> None:
        """Clients of one process hold equal additions once."""
        if memory.version == self._additions[0]:
            memory.frozen = self._additions[1]
        elif memory.version > self._additions[0]:
            self._additions = (memory.version, memory.frozen)

    def restore(self, state: ServerState) -> None:
        """Give clients the frozen additions, or shared factors, that the server thinks they have."""
        for name, version in state.held.items():
            memory = self.clients[name].memory
            if state.log.version:  # what they hold are shared factors
                known = version == state.log.version
                memory.version, memory.shared = (version, state.shared) if known else (0, {})
                state.held[name] = memory.version
                continue
            memory.version, memory.frozen = state.frozen.until(version)
            state.held[name] = version if memory.version else 0
            self._share(memory)


def run_rounds(
    server: ServerCore, engine: Engine, store: RoundStore, *, done: Callable[[RoundRecord], None] | None = None
) -> None:
    """Run the rounds that are not done yet; each is on disk before the next begins.

    Parameters
    ----------
    server : ServerCore
        Begins at its state.
    engine : Engine
        Carries messages.
    store : RoundStore
        Keeps what is needed to go on. Replies that were kept of an interrupted round are used again.
    done : callable, optional
        Told of every round.

    Raises
    ------
    HoneloomError
        Three rounds in a row had too few replies.
    """
    pending: list[RoundRecord] = []  # rounds that changed nothing; another attempt may do better
    engine.restore(server.state)
    first = True
    while server.state.round < server.config.rounds:
        begun, clock = time.monotonic(), _Clock()
        with clock:
            tasks = server.begin(store.opened(server.state.round + 1))
            asked = len(tasks)
            for client, data in store.replies(server.state.round + 1):
                if client in tasks and server.ingest(client, data) == "ok":
                    del tasks[client]
        if first:  # what was kept has moved the state
            engine.restore(server.state)
            first = False
        needed = max(1, math.ceil(server.config.quorum * asked)) - (asked - len(tasks))
        while tasks:
            _exchange(server, engine, store, tasks, needed, clock)
            with clock:
                tasks = server.proceed()
            if server.opens and tasks:
                store.note_opened(server.state.round + 1)
            needed = max(1, math.ceil(server.config.quorum * len(tasks)))
        with clock:
            record = server.finish()
        record.seconds, record.server_seconds = time.monotonic() - begun, clock.seconds
        pending.append(record)
        if done is not None:
            done(record)
        if record.applied or server.state.round == server.config.rounds:
            store.save(server.state, *pending)
            pending = []
        elif len(pending) == MOST_EMPTY:
            raise HoneloomError(
                f"{MOST_EMPTY} rounds in a row changed nothing ({_why(record)}); mend that, and go on with --resume"
            )


def _exchange(
    server: ServerCore, engine: Engine, store: RoundStore, tasks: dict[str, bytes], needed: int, clock: _Clock
) -> None:  # fmt: skip
    """Carry tasks and take replies; a client that has lost what it held gets its task again, whole."""
    due = time.monotonic() + server.config.deadline
    while tasks:
        again = {}
        for client, reply in engine.exchange(tasks, max(0.0, due - time.monotonic()), needed):
            with clock:
                if isinstance(reply, Silence):
                    server.fail(client, reply.reason, status=reply.status)
                    continue
                status = server.ingest(client, reply)
                if status == "ok" and server.keeps_replies:
                    store.keep_reply(server.state.round + 1, client, reply)
                if status == "ok":
                    needed -= 1
                elif status == "again":
                    again[client] = server.again(client)
        tasks = again


def _why(record: RoundRecord) -> str:
    reasons = [f"{c.id}: {c.reason or c.status}" for c in record.clients if c.status != "ok"]
    return record.reason or "; ".join(reasons) or "nobody was asked"


class _Clock:
    """Adds up the time of its contexts."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._begun
