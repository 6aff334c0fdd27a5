"""Federations on Flower: our messages inside Flower's, carried by its grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from honeloom.errors import ConfigError, HoneloomError
from honeloom.federated.experiment import Experiment
from honeloom.federated.rounds import Silence
from honeloom.federated.server import ServerState

__all__ = ["FlowerEngine", "pack", "public_key_hex", "unpack"]

POLL = 0.5
"""Seconds between looks at the grid."""
NODE_GONE = 5
"""Flower's code of an error it makes itself where a node went away with a message."""


def pack(data: bytes, **told: str) -> RecordDict:
    """Our message as Flower's records: one array of bytes, which Flower sends in chunks, and some settings."""
    record = RecordDict({"told": ConfigRecord(dict(told))})
    if data:
        record["message"] = ArrayRecord({"bytes": Array(np.frombuffer(data, dtype=np.uint8))})
    return record


def unpack(content: RecordDict) -> bytes:
    """The bytes of `pack`; none where the content is something else."""
    record = content.array_records.get("message")
    array = record.get("bytes") if record is not None else None
    if array is None or array.dtype != "uint8":
        return b""
    found: bytes = array.numpy().tobytes()  # .npy without objects: Flower reads it with allow_pickle=False
    return found


@dataclass(slots=True)
class _Sent:
    """A task on its way: whose, to which node, of which round."""

    client: str
    node: int
    round: int


class FlowerEngine:
    """Carries messages over a grid to whichever node says that it is a client.

    A round begins for a client as soon as its node is connected. Whoever is not there within the
    patience, counted from when the quorum was reached, is absent; who does not reply within the
    deadline is late, and its reply is not used when it comes.

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
        self._told: set[str] = set()
        self._sent: dict[str, _Sent] = {}

    def restore(self, state: ServerState) -> None:
        """Clients of a new run hold nothing."""
        state.held.clear()

    def exchange(self, tasks: Mapping[str, bytes], deadline: float) -> Iterator[tuple[str, bytes | Silence]]:
        """Yield replies as they come, late ones of earlier rounds too, and at last who did not reply."""
        self._round += 1
        due = time.monotonic() + deadline
        open_ = dict.fromkeys(tasks)  # clients without a reply
        missed: dict[str, float] = {}  # since when a client's node is not there
        told = False
        while open_ and time.monotonic() < due:
            online = {node.node_id: node for node in self.grid.get_nodes()}
            self._meet(online)
            self._send({name: tasks[name] for name in open_}, online, due)
            for name, reply, number in self._replies():
                if name in tasks and name in open_:
                    yield name, reply
                    if number == self._round:
                        del open_[name]
            now = time.monotonic()
            gone = [name for name in open_ if self._nodes.get(name) not in online]
            missed = {name: missed.get(name, now) for name in gone}
            if len(gone) > len(tasks) - max(1, math.ceil(self.config.quorum * len(tasks))):
                missed = dict.fromkeys(gone, now)  # too few are there to go on without the others
                if not told:
                    self._tell(f"waiting for nodes of {', '.join(gone)}")
                told = True
            for name, since in missed.items():
                if now - since >= self.config.patience:
                    del open_[name]
                    yield name, Silence(f"its node is not connected, for {self.config.patience:g} s")
            if not self._wanted():
                raise HoneloomError("the command that began this federation is gone; `--resume` goes on")
            time.sleep(POLL)
        for name in open_:
            if self._nodes.get(name) in {node.node_id for node in self.grid.get_nodes()}:
                yield name, Silence(f"no reply within {deadline:g} s", "late")
            else:
                yield name, Silence(f"its node is not connected, for {deadline:g} s")

    def _meet(self, online: Mapping[int, object]) -> None:
        """Ask new nodes who they are, and let each client be the node that says so."""
        for node in online:
            if node not in self._claims:
                self._claims[node] = None
                content = pack(b"", setup=self._text)
                (number,) = self.grid.push_messages(
                    [Message(content, dst_node_id=node, message_type=MessageType.QUERY)]
                )
                self._asked[number] = node
        for message in list(self.grid.pull_messages(list(self._asked))) if self._asked else []:
            node = self._asked.pop(message.metadata.reply_to_message_id)
            if message.has_error():
                self._warn(f"node {node} does not say who it is: {_why(message)}")
            else:
                self._claims[node] = str(message.content["told"].get("client", ""))[:64]
        for node, name in self._claims.items():
            if name is None or node not in online or self._nodes.get(name) == node:
                continue
            if name not in self.setup.clients:
                self._warn(f"node {node} says that it is {name!r}, none of the clients; it is not asked")
            elif (key := self._keys.get(name)) and key != public_key_hex(getattr(online[node], "public_key", b"")):
                self._warn(
                    f"node {node} says that it is {name!r}, with another key than that client's; it is not asked"
                )
            elif self._nodes.get(name) in online:
                self._warn(f"node {node} says that it is {name!r}, which another node is; it is not asked")
            else:
                self._nodes[name] = node

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
            message = Message(
                pack(task, setup=self._text), dst_node_id=node, message_type=MessageType.TRAIN,
                ttl=2 * left, group_id=str(self._round),
            )  # fmt: skip
            (number,) = self.grid.push_messages([message])
            self._sent[number] = _Sent(name, node, self._round)

    def _replies(self) -> Iterator[tuple[str, bytes | Silence, int]]:
        """What has come: client, reply and the round it belongs to."""
        if not self._sent:
            return
        for message in list(self.grid.pull_messages(list(self._sent))):
            sent = self._sent.pop(message.metadata.reply_to_message_id)
            if not message.has_error():
                yield sent.client, unpack(message.content), sent.round
            elif sent.round == self._round and message.error.code != NODE_GONE:  # it is sent again once it is back
                yield sent.client, Silence(f"the client's process failed: {_why(message)}", "rejected"), sent.round


def _why(message: Message) -> str:
    """The last line of an error's reason, which ends with the exception itself."""
    lines = [line for line in str(message.error.reason or "").splitlines() if line.strip()]
    return f"{lines[-1].strip()[:300]} (code {message.error.code})" if lines else f"code {message.error.code}"


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
