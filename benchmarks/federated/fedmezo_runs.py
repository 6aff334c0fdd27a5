"""Federations for the benchmarks of zeroth-order clients: eight clients by domain, losses on rows that none has.

Each run goes through the product's own server, messages, clients and model in one process; the model stays loaded, and
held-out losses are taken after the rounds that are asked for. A finished run is a small file, so that an interrupted
benchmark goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.federated_port import open_port
from honeloom.backends.hf.score import Scorer
from honeloom.config.base import validate
from honeloom.data.reader import read_file
from honeloom.data.sources import resolve_sources
from honeloom.federated.client import ClientCore
from honeloom.federated.experiment import client_settings
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.federate_parts import PartitionConfig
from honeloom.federated.partition import partition
from honeloom.federated.rounds import InlineEngine, run_rounds
from honeloom.federated.server import ServerCore
from honeloom.federated.store import RoundStore
from honeloom.testing.fakes import FakeRows
from honeloom.types.rows import Row

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "selection"))

from tunings import read, real_rows, write  # noqa: E402

Options = dict[str, Any]
CHOICE_SEEDS, CHOICE_ROWS = {"stories260k": (100, 101), "base6m": (100,)}, 8
"""Seeds that rates are chosen on, and rows of a domain; one run may be lucky where others lose their way."""
CLIENTS = 8
WIDEST = (1e-7, 1.0)
"""How far rates are sought where the best one is at an end of those tried."""


@dataclass(frozen=True)
class World:
    """A model, rows of the clients, rows by which rates are chosen, rows that judge, and where finished runs lie."""

    name: str
    model: Path
    pool: Path
    choice: Path
    test: Path
    local: Mapping[str, Any]
    out: Path
    spent: list[float] = field(default_factory=list)


NEW = ("gsm8k", "codealpaca", "gpteacher-codegen")
"""Sources that base6m saw nothing of; the fourth, pubmedqa, has rows that are too long."""
PER_SOURCE = {"choice": 12, "test": 40, "pool": 300}


def world(name: str, data: Path, out: Path, **local: Any) -> World:
    """Rows for a model; no row is in two files, and none is one that it was trained on.

    stories260k has rows of all domains of mixed_demo. base6m knows most of these: on them first-order tuning itself
    gains a hundredth. It has rows of the sources that it saw nothing of, each a domain of its own.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = new_rows(data) if name == "base6m" else mixed_rows(data)
    paths = {part: write(out / f"{part}.jsonl", rows) for part, rows in files.items()}
    return World(name, data / "models" / name, paths["pool"], paths["choice"], paths["test"], local, out)


def by_digest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """In an order that nobody chose."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())


def mixed_rows(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Of mixed_demo what base6m never saw, with its domains."""
    rows, test = real_rows(data)
    domains = sorted({row["domain"] for row in rows})
    choice = [row for d in domains for row in by_digest([r for r in rows if r["domain"] == d])[:CHOICE_ROWS]]
    taken = {row["id"] for row in choice}
    return {"pool": [row for row in rows if row["id"] not in taken], "choice": choice, "test": test}


def new_rows(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Some rows of every new source, which is their domain."""
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PER_SOURCE}
    for source in NEW:
        rows = by_digest([{**row, "domain": source} for row in read(data / "instruct" / f"{source}.jsonl.gz")])
        for part, count in PER_SOURCE.items():
            found[part] += rows[:count]
            rows = rows[count:]
    return found


@lru_cache(maxsize=8)
def rows_of(path: Path) -> tuple[Row, ...]:
    """All rows of a file."""
    (file,) = resolve_sources([str(path)])
    return tuple(row for row in read_file(file) if isinstance(row, Row))


@lru_cache(maxsize=4)
def port_of(model: Path, settings: str) -> Any:
    """The model, loaded once for all runs that open it alike."""
    return open_port(model, json.loads(settings), {}, name=model.name)


def run(at: World, options: Options, lr: float, seed: int, marks: Sequence[int], rows: Path) -> dict[str, Any]:
    """What a federation came to, made once: held-out losses after some rounds, and lines of the rounds.

    Parameters
    ----------
    at : World
        Model and rows.
    options : dict
        As in FED.yaml.
    lr, seed
        Of the federation.
    marks : sequence of int
        Rounds after which held-out losses are taken; 0 is before the first.
    rows : Path
        Rows that they are taken on.
    """
    given = {**at.local, **options, "lr": lr, "seed": seed, "rounds": max(marks), "device": "cpu", "dtype": "fp32"}
    given = {"partition": {"type": "domain", "n": CLIENTS}, **given}
    key = json.dumps([at.name, given, sorted(marks), _digest(at.pool), _digest(rows)], sort_keys=True)
    path = at.out / f"{at.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        at.spent.append(kept["seconds"])
        return kept
    begun = time.process_time()
    found = {"settings": given, **_federated(at, given, marks, rows), "seconds": time.process_time() - begun}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(path)
    at.spent.append(found["seconds"])
    losses = ", ".join(f"{mark}: {macro(found['held'][str(mark)]):.4f}" for mark in sorted(marks))
    print(at.name, f"lr {lr:g} seed {seed} {describe(options)}: {losses}; {found['seconds']:.0f} s", flush=True)
    return found


def describe(options: Options) -> str:
    """In one line."""
    return json.dumps({k: v for k, v in options.items() if k not in ("local_steps",)}, sort_keys=True)


def _federated(at: World, given: Options, marks: Sequence[int], rows: Path) -> dict[str, Any]:
    config = validate(FederateConfig, {"model": str(at.model), "rows": str(at.pool), **given}, what="benchmark")
    port = port_of(at.model, json.dumps(client_settings(config), sort_keys=True))
    table = FakeRows(list(rows_of(at.pool)))
    assert isinstance(config.partition, PartitionConfig)
    clients = {}
    for name, places in partition(table, config.partition, seed=config.seed).items():
        port.admit(name, [list(table)[i] for i in places])
        clients[name] = ClientCore(name, port)
    held: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, one_thread(torch.device("cpu")):
        store = RoundStore(Path(folder))
        server = ServerCore(config, "benchmark", port.modules, store.load())
        if 0 in marks:
            held["0"] = losses_of(at, config, port, server, rows)

        def done(record: Any) -> None:
            if record.round in marks:
                held[str(record.round)] = losses_of(at, config, port, server, rows)

        run_rounds(server, InlineEngine(clients), store, done=done)
        lines = [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()]
    return {"held": held, "rounds": [summary(line) for line in lines]}


def losses_of(at: World, config: FederateConfig, port: Any, server: ServerCore, rows: Path) -> dict[str, float]:
    """Mean loss of the rows of every domain, in nats per token, of the model as the server has it."""
    if config.method == "full":
        pool, sums = server.begun.pool, server.state.pool
        assert pool is not None
        model = port.hold(pool.seeds() if sums is not None else [], [] if sums is None else sums.tolist(),
                          config.optimizer.direction)  # fmt: skip
    else:
        model = port.hold(server.state.total() or _nothing(port))
    encoder: Encoder = port.held.encoder
    sums_by: dict[str, list[float]] = {}
    for row, loss in Scorer(model, encoder, 16).losses(list(rows_of(rows))):
        mine = sums_by.setdefault(str(row.domain), [0.0, 0.0])
        mine[0] += loss.loss_sum
        mine[1] += loss.tokens
    return {domain: total / tokens for domain, (total, tokens) in sorted(sums_by.items()) if tokens}


def _nothing(port: Any) -> Any:
    return {name: (torch.zeros(m, 1), torch.zeros(1, n)) for name, (m, n) in port.modules.items()}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a line of rounds.jsonl: losses of clients on their own rows, weighted by rows; bytes, rates, norms."""
    ok = [client for client in record["clients"] if client["status"] == "ok"]
    count = sum(client["rows"] for client in ok)
    means = {
        key: sum(c[key] * c["rows"] for c in ok) / count
        for key in ("loss_before", "loss_train", "loss_after")
        if all(c[key] is not None for c in ok)
    }
    sizes = {key: sum(c[key] for c in ok) / len(ok) for key in ("bytes_up", "bytes_down")}
    rates = {c["id"]: c["lr"] for c in ok}
    return {"round": record["round"], "error": record["error"], **means, **sizes, "lr": rates}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def macro(losses: Mapping[str, float]) -> float:
    """Mean over domains."""
    return float(np.mean(list(losses.values())))


def best_rate(at: World, options: Options, rates: Sequence[float], mark: int) -> list[tuple[float, float]]:
    """(rate, loss on the rows of the choice), best first; further rates while the best one is at an end."""
    found: dict[float, float] = {}
    wanted = list(rates)
    while wanted:
        for lr in wanted:
            runs = [run(at, options, lr, seed, (mark,), at.choice) for seed in CHOICE_SEEDS[at.name]]
            losses = np.array([macro(one["held"][str(mark)]) for one in runs])
            found[lr] = float(losses.mean()) if np.isfinite(losses).all() else float("inf")
        best = min(found, key=lambda lr: found[lr])
        step = {min(found): best / 2, max(found): best * 2}.get(best)
        wanted = [step] if step is not None and WIDEST[0] <= step <= WIDEST[1] else []
    return sorted(found.items(), key=lambda pair: pair[1])
