"""A client's process: one message, one answer; what a client keeps between messages is in Flower's context."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from honeloom.backends.devices import one_thread
from honeloom.backends.flower.engine import pack, told_in, unpack
from honeloom.backends.flower.launch import SIMULATION
from honeloom.backends.hf.federated_model import FederatedModel
from honeloom.backends.hf.federated_port import open_port
from honeloom.backends.hf.federated_weights import FederatedWeights
from honeloom.data.reader import read_file
from honeloom.data.sources import RowFile
from honeloom.errors import ConfigError, HoneloomError, RowsError
from honeloom.federated.client import WORDS, ClientCore, ClientMemory
from honeloom.federated.experiment import ClientSetup
from honeloom.federated.messages import TrainReply, decode_task, encode
from honeloom.stages.inputs import resolve_model, resolve_rows
from honeloom.stages.rows import read_split
from honeloom.types.rows import Rejected, Row

app = ClientApp()
GROUPS = ("frozen", "shared")
"""Of a client's memory, what is made of factors."""
_admitted: dict[str, str] = {}
"""Where the rows of this process's clients came from."""


@app.query()  # type: ignore[untyped-decorator]
def query(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    name = _name(_setup(message), context)
    return Message(pack(b"", client=name), reply_to=message)


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train as the task says; what goes wrong is told in the reply."""
    setup, data = _setup(message), unpack(message.content)
    name = _name(setup, context)
    memory = _remembered(context)
    with one_thread(torch.device("cpu")):
        reply = _handle(setup, data, name, memory, context)
    _remember(context, memory)
    return Message(pack(reply, client=name), reply_to=message)


def _handle(setup: ClientSetup, data: bytes, name: str, memory: ClientMemory, context: Context) -> bytes:
    task = decode_task(data)
    try:
        if task.phase not in WORDS:
            _require_noise(task.settings.get("dp"), context)
        # Where nothing is trained, no model is loaded.
        port = None if task.phase in ("shares", "reveal") else _port(setup, name, context)
    except HoneloomError as error:
        return encode(TrainReply(task.experiment, task.round, name, error=f"{type(error).__name__}: {error}"))
    return ClientCore(name, port, memory).reply_to(data)


def _require_noise(dp: Mapping[str, Any] | None, context: Context) -> None:
    """Refuse a task with less noise than the node demands: it is the server that asks for it."""
    node = context.node_config
    least, most = float(node.get("dp-noise", 0.0)), float(node.get("dp-clip", math.inf))
    if least and (dp is None or float(dp["noise"]) < least or float(dp["clip"]) > most):
        raise ConfigError(f"this node takes part with privacy.dp of noise {least:g} or more and clip {most:g} or less")


def _setup(message: Message) -> ClientSetup:
    return ClientSetup.of_text(told_in(message.content, "setup"))


def _name(setup: ClientSetup, context: Context) -> str:
    """The client that this node is: `client` of its settings, else its `partition-id` among the clients."""
    node = context.node_config
    if "client" in node:
        return str(node["client"])
    place = node.get("partition-id")
    if isinstance(place, int) and 0 <= place < len(setup.clients):
        return setup.clients[place]
    raise ConfigError(
        f"this node does not say which client it is ({dict(node)}); start it with --node-config 'client=\"NAME\"', "
        f"one of {', '.join(setup.clients[:8])}"
    )


def _port(setup: ClientSetup, name: str, context: Context) -> FederatedModel | FederatedWeights:
    """The model of this process with the client's rows; a process that serves many clients loads it once."""
    node = context.node_config
    model = str(node.get("model", setup.model))
    settings = {**setup.settings, **({"device": str(node["device"])} if "device" in node else {})}
    _check_base(setup, model, context)
    port = _model(model, json.dumps(settings, sort_keys=True))
    source = f"{node.get('rows', setup.rows)}"
    if name not in port.clients() or _admitted.get(name) != source:
        port.admit(name, list(_rows(setup, name, node.get("rows"))))
        _admitted[name] = source
    return port


@lru_cache(maxsize=1)
def _model(model: str, settings: str) -> FederatedModel | FederatedWeights:
    return open_port(resolve_model(model, known="unchecked").paths[0], json.loads(settings), {}, name=model)


def _check_base(setup: ClientSetup, model: str, context: Context) -> None:
    """Refuse a base other than the server's; read once per run, and again when its files change."""
    folder = resolve_model(model, known="unchecked").paths[0]
    stamp = ";".join(f"{p.name},{p.stat().st_size},{p.stat().st_mtime_ns}" for p in sorted(folder.iterdir()))
    checked = context.state.config_records.get("base")
    if checked is not None and checked["stamp"] == stamp and checked["fingerprint"] == setup.base:
        return
    found = resolve_model(model).fingerprint
    if found != setup.base:
        raise ConfigError(
            f"the base {model} is not the server's (fingerprint {found[:12]}, and the server has {setup.base[:12]}); "
            "give the node the same files, with --node-config 'model=\"PATH\"'"
        )
    context.state["base"] = ConfigRecord({"stamp": stamp, "fingerprint": found})


def _rows(setup: ClientSetup, name: str, given: object) -> Iterator[Row]:
    """Rows that the node names, or in a simulation of this machine's those that were listed for the client."""
    simulated = os.environ.get(SIMULATION)  # set by whoever started this process, so that no server can claim it
    if given is None and setup.rows is not None and simulated and Path(simulated) == Path(setup.rows).parent:
        listed = json.loads((Path(setup.rows) / f"{name}.json").read_text())
        for part in listed:
            file = RowFile(**{**part["file"], "path": Path(part["file"]["path"])})
            for row in read_file(file, np.array(part["lines"], dtype=np.int64)):
                if isinstance(row, Rejected):
                    raise RowsError(f"{row.where}: {row.reason}; the file was changed since the federation began")
                yield row
        return
    if given is None:
        raise ConfigError(f"the node of {name} names no rows; start it with --node-config 'rows=\"FILE\"'")
    how = setup.settings
    split = (how["split"][0], how["split"][1]) if how["split"] else None
    reading = {key: how[key] for key in ("limit", "strict", "max_bad")}
    yield from read_split(resolve_rows(str(given)).files, split=split, **reading)


def _remembered(context: Context) -> ClientMemory:
    plain = context.state.config_records.get("memory")
    if plain is None:
        return ClientMemory()
    memory = ClientMemory(
        int(plain["version"]), int(plain["round"]), secrets=json.loads(str(plain["secrets"])), sent=bytes(plain["sent"])
    )
    for group in GROUPS:
        arrays = context.state.array_records[group]
        tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        modules = [name.removesuffix("|b") for name in tensors if name.endswith("|b")]
        getattr(memory, group).update({m: (tensors[f"{m}|b"], tensors[f"{m}|a"]) for m in modules})
    return memory


def _remember(context: Context, memory: ClientMemory) -> None:
    known = context.state.config_records.get("memory")
    if known is None or known["version"] != memory.version:
        for group in GROUPS:
            context.state[group] = ArrayRecord(
                {
                    f"{module}|{factor}": Array(tensor.numpy())
                    for module, pair in getattr(memory, group).items()
                    for factor, tensor in zip("ba", pair, strict=True)
                }
            )
    context.state["memory"] = ConfigRecord(
        {
            "version": memory.version,
            "round": memory.round,
            "secrets": json.dumps(memory.secrets),
            "sent": memory.sent,
        }
    )
