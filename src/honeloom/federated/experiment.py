"""A federation as its processes are told of it: the server reads a file, clients get their part with every message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from honeloom.config.base import validate
from honeloom.errors import MessageError
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.messages import PROTOCOL
from honeloom.runs.atomic import canonical_json, write_json

__all__ = ["ClientSetup", "Experiment", "client_settings", "experiment_name"]


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """What a client's process must know to open its model and rows.

    Attributes
    ----------
    clients : tuple of str
        Names in their order; a node's `partition-id` is a place among them.
    model : str
        Hub id or path of the base; a node may have it elsewhere.
    base : str
        Fingerprint of the base's files: a client with another base is refused.
    rows : str or None
        Folder with a list of rows for every client, in a simulation; None: nodes name their rows.
    settings : mapping
        Of the model, the adapters and the rows, as in FED.yaml.
    """

    clients: tuple[str, ...]
    model: str
    base: str
    rows: str | None
    settings: Mapping[str, Any]

    def to_text(self) -> str:
        """As JSON."""
        return canonical_json({"protocol": PROTOCOL, **asdict(self)})

    @classmethod
    def of_text(cls, text: str) -> ClientSetup:
        """Read what `to_text` wrote.

        Raises
        ------
        MessageError
            The server has another version of the protocol.
        """
        plain = json.loads(text)
        if plain.pop("protocol", None) != PROTOCOL:
            raise MessageError(f"the server does not speak protocol {PROTOCOL}; install the same version of honeloom")
        return cls(**{**plain, "clients": tuple(plain["clients"])})


CLIENT_SETTINGS = (
    "method", "targets", "batch_size", "max_length", "load_in", "dtype", "device", "split", "limit", "strict",
    "max_bad",
)  # fmt: skip


def client_settings(config: FederateConfig) -> dict[str, Any]:
    """What of the settings a client's process needs to open its model and rows."""
    plain = config.model_dump(mode="json")
    return {name: plain[name] for name in CLIENT_SETTINGS}


@dataclass(frozen=True, slots=True)
class Experiment:
    """What the server's process must know.

    Attributes
    ----------
    name : str
        Of the federation; replies of another are refused.
    config : FederateConfig
        Settings.
    modules : mapping
        Shape (m, n) of every module with an adapter.
    folder : Path
        Where rounds and state are kept.
    model, base, rows
        As of `ClientSetup`.
    keys : mapping
        Public keys of clients' nodes, as hex of their DER form; a node with another key is not asked.
    """

    name: str
    config: FederateConfig
    modules: Mapping[str, tuple[int, int]]
    folder: Path
    model: str
    base: str
    rows: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    def setup(self) -> ClientSetup:
        """What clients are told."""
        names = tuple(client.id for client in self.config.members())
        return ClientSetup(names, self.model, self.base, self.rows, client_settings(self.config))

    def write(self, path: Path) -> None:
        """Write it to a file."""
        plain = {**asdict(self), "config": self.config.model_dump(mode="json"), "folder": str(self.folder)}
        write_json(path, plain)

    @classmethod
    def read(cls, path: Path) -> Experiment:
        """Read what `write` wrote."""
        plain = json.loads(path.read_text())
        plain["config"] = validate(FederateConfig, plain["config"], what=str(path))
        plain["modules"] = {module: (m, n) for module, (m, n) in plain["modules"].items()}
        return cls(**{**plain, "folder": Path(plain["folder"])})


def experiment_name(config: FederateConfig, inputs: Mapping[str, str]) -> str:
    """A name that settings and the inputs' fingerprints decide, so that an interrupted federation goes on under it."""
    plain = config.model_dump(mode="json", exclude={"engine", "superlink", "parallel"})
    return hashlib.sha256(canonical_json({"config": plain, "inputs": dict(inputs)}).encode()).hexdigest()[:16]
