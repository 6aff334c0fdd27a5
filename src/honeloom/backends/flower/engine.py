"""Federations on Flower: our messages inside Flower's, carried by its grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from honeloom.errors import ConfigError, HoneloomError
from honeloom.federated.experiment import Experiment
from honeloom.federated.rounds import Silence
from honeloom.federated.state import ServerState
from honeloom.types.views import plain

__all__ = ["FlowerEngine", "pack", "public_key_hex", "told_in", "unpack"]

POLL = 0.5
"""Seconds between looks at the grid."""
BYTES = "honeloom.bytes"
"""Kind of an array that is our message as it is."""
NODE_GONE = 5
"""Flower's code of an error it makes itself where a node went away with a message."""


def pack(data: bytes, **told: str) -> RecordDict:
    """Our message as Flower's records: its bytes as one array, which Flower sends in chunks, and some settings."""
    record = RecordDict({"told": ConfigRecord(dict(told))})
    if data:
        record["message"] = ArrayRecord({"bytes": Array("uint8", (len(data),), BYTES, data)})
    return record


def unpack(content: RecordDict) -> bytes:
    """The bytes of `pack`; none where the content is something else. Nothing is parsed."""
    record = content.array_records.get("message")
    array = record.get("bytes") if record is not None else None
    return array.data if array is not None and array.stype == BYTES else b""


def told_in(content: RecordDict, key: str) -> str:
    """A setting of `pack`, or an empty text."""
    record = content.config_records.get("told")
    value = record.get(key) if record is not None else None
    return value if isinstance(value, str) else ""


@dataclass(slots=True)
class _Sent:
    """A task on its way: whose, to which node, of which round."""

    client: str
    node: int
    round: int


class FlowerEngine:
    """Carries messages over a grid to whichever node says that it is a client.

    A round begins for a client as soon as its node is connected. Whoever is not there within the
    patience, counted from when the quorum was reached and every connected node has said who it is,
    is absent; who does not reply within the deadline is late, and its reply is not used when it comes.

    Parameters
    ----------
    grid : Grid
        Of the ServerApp.
    experiment : Experiment
        Clients and settings.
    tell : callable, optional
        Told what an operator should know.
    wanted : callable, optional
        Whether anybody still waits for the result; asked about twice a second.
    """

    def __init__(
        self,
        grid: Grid,
        experiment: Experiment,
        *,
        tell: Callable[[str], None] = print,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.grid = grid
        self.setup = experiment.setup()
        self.config = experiment.config
        self._keys = experiment.keys
        self._text = self.setup.to_text()
        self._tell = tell
        self._wanted = wanted
        self._round = 0
        self._nodes: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._claims: dict[int, str | None] = {}
        self._since: dict[int, float] = {}  # when each connected node was first asked who it is
        self._told: set[str] = set()
        self._sent: dict[str, _Sent] = {}

    def restore(self, state: ServerState) -> None:
        """Clients of a new run hold nothing."""
        state.held.clear()

    def exchange(
        self, tasks: Mapping[str, bytes], deadline: float, needed: int
    ) -> Iterator[tuple[str, bytes | Silence]]:
        """Yield replies as they come, late ones of earlier rounds too, and at last who did not reply."""
        self._round += 1
        due = time.monotonic() + deadline
        open_ = dict.fromkeys(tasks)  # clients without a reply
        missed: dict[str, float] = {}  # since when a client's node is not there
        while open_ and time.monotonic() < due:
            online = {node.node_id: node for node in self.grid.get_nodes()}
            self._meet(online)
            self._send({name: tasks[name] for name in open_}, online, due)
            for name, reply, number in self._replies():
                if name in open_:
                    yield name, reply
                    if number == self._round:
                        del open_[name]
                        needed -= 1
            now = time.monotonic()
            gone = [name for name in open_ if self._nodes.get(name) not in online]
            missed = {name: missed.get(name, now) for name in gone}
            if len(open_) - len(gone) < needed:
                missed = dict.fromkeys(gone, now)  # too few are there to go on without the others
                self._warn(f"waiting for nodes of {', '.join(gone)}")
            elif self._unnamed(now - deadline):
                missed = dict.fromkeys(gone, now)  # a client's process takes seconds to start: this may be one of them
            for name, since in missed.items():
                if now - since >= self.config.patience:
                    del open_[name]
                    yield name, Silence(f"its node is not connected, for {self.config.patience:g} s")
            if not self._wanted():
                raise HoneloomError("the command that began this federation is gone; `--resume` goes on")
            time.sleep(POLL)
        for node in self._unnamed() if open_ else ():
            self._warn(f"node {node} is connected and does not say who it is; its log may say why")
        for name in open_:
            if self._nodes.get(name) in {node.node_id for node in self.grid.get_nodes()}:
                yield name, Silence(f"no reply within {deadline:.0f} s", "late")
            else:
                yield name, Silence(f"its node is not connected, for {deadline:.0f} s")

    def _unnamed(self, since: float = -math.inf) -> list[int]:
        """Connected nodes that have not said who they are, of those first asked after a moment."""
        return [node for node, first in self._since.items() if self._claims.get(node) is None and first > since]

    def _meet(self, online: Mapping[int, object]) -> None:
        """Ask new nodes who they are, and let each client be the node that says so."""
        # Who went away may come back as somebody else, and whose answer failed is asked again.
        self._claims = {node: name for node, name in self._claims.items() if node in online}
        self._since = {node: since for node, since in self._since.items() if node in online}
        for node in online:
            if node not in self._claims:
                number = self._push(pack(b"", setup=self._text), node, MessageType.QUERY)
                if number is not None:
                    self._claims[node] = None
                    self._since.setdefault(node, time.monotonic())
                    self._asked[number] = node
        for message in list(self.grid.pull_messages(list(self._asked))) if self._asked else []:
            node = self._asked.pop(message.metadata.reply_to_message_id, -1)
            if message.has_error():
                self._claims.pop(node, None)
                if node in self._since and message.error.code != NODE_GONE:
                    self._since[node] = -math.inf  # asked again, but nobody waits for it
                self._warn(f"node {node} does not say who it is: {_why(message)}")
            elif node in self._claims:
                self._claims[node] = plain(told_in(message.content, "client"))[:64]
        for node, name in self._claims.items():
            if name is None or self._nodes.get(name) == node:
                continue
            if name not in self.setup.clients:
                self._warn(f"node {node} says that it is {name!r}, none of the clients; it is not asked")
            elif (key := self._keys.get(name)) and key != _key_of(online[node]):
                self._warn(f"node {node} says that it is {name!r}, with another key than its; it is not asked")
            elif self._nodes.get(name) in online:
                self._warn(f"node {node} says that it is {name!r}, which another node is; it is not asked")
            else:
                self._nodes[name] = node

    def _push(self, content: RecordDict, node: int, kind: str, **how: Any) -> str | None:
        """Send a message; its number, or None where the SuperLink did not take it."""
        message = Message(content, dst_node_id=node, message_type=kind, **how)
        numbers = [number for number in self.grid.push_messages([message]) if number]
        if not numbers:
            self._warn(f"the SuperLink did not take a message to node {node}; its log says why")
        return numbers[0] if numbers else None

    def _warn(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._tell(text)

    def _send(self, tasks: Mapping[str, bytes], online: Mapping[int, object], due: float) -> None:
        """Send tasks to the nodes that are there and have not got theirs."""
        has = {(sent.client, sent.node) for sent in self._sent.values() if sent.round == self._round}
        for name, task in tasks.items():
            node = self._nodes.get(name)
            if node is None or node not in online or (name, node) in has:
                continue
            left = max(1.0, due - time.monotonic())
            number = self._push(
                pack(task, setup=self._text), node, MessageType.TRAIN, ttl=2 * left, group_id=str(self._round)
            )
            if number is not None:
                self._sent[number] = _Sent(name, node, self._round)

    def _replies(self) -> Iterator[tuple[str, bytes | Silence, int]]:
        """What has come: client, reply and the round it belongs to."""
        if not self._sent:
            return
        for message in list(self.grid.pull_messages(list(self._sent))):
            sent = self._sent.pop(message.metadata.reply_to_message_id, None)
            if sent is None:
                continue
            if not message.has_error():
                yield sent.client, unpack(message.content), sent.round
            elif sent.round == self._round and message.error.code != NODE_GONE:  # it is sent again once it is back
                yield sent.client, Silence(f"the client's process failed: {_why(message)}", "rejected"), sent.round


def _why(message: Message) -> str:
    """The last line of an error's reason, which ends with the exception itself."""
    lines = [line for line in str(message.error.reason or "").splitlines() if line.strip()]
    return f"{plain(lines[-1])[:300]} (code {message.error.code})" if lines else f"code {message.error.code}"


def _key_of(node: object) -> str:
    """A node's key as `public_key_hex` has it; of one that cannot be read, nothing that equals another."""
    try:
        return public_key_hex(bytes(getattr(node, "public_key", b"")))
    except ConfigError:
        return "unreadable"


def public_key_hex(key: bytes) -> str:
    """A public key in PEM or OpenSSH form as hex of its DER form; empty for none.

    Raises
    ------
    ConfigError
        It is neither.
    """
    if not key:
        return ""
    read = serialization.load_ssh_public_key if key.startswith(b"ecdsa-") else serialization.load_pem_public_key
    try:
        found = read(key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"not a public key in PEM or OpenSSH form: {error}") from None
    return found.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo).hex()
