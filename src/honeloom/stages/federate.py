"""`federate`: rows stay with their clients, and one adapter comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.devices import choose_device, one_thread, release_memory
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.compare import largest_gap, row_logits
from honeloom.backends.hf.federated_model import FederatedModel
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.checkpoint.adapter import LoraFile
from honeloom.checkpoint.adapter_writer import combined_config, write_adapter
from honeloom.checkpoint.folders import copy_tokenizer, discard
from honeloom.checkpoint.writer import TensorStream
from honeloom.data.rowset import RowSet
from honeloom.errors import ConfigError, HoneloomError, SourceError
from honeloom.federated.client import ClientCore
from honeloom.federated.experiment import Experiment, experiment_name
from honeloom.federated.federate_config import FederateConfig, SuperlinkConfig
from honeloom.federated.partition import partition, partition_record
from honeloom.federated.privacy import exposure_of
from honeloom.federated.rounds import InlineEngine, run_rounds
from honeloom.federated.server import ServerCore
from honeloom.federated.store import ROUNDS, STATE, RoundStore
from honeloom.ops.lowrank import compress
from honeloom.registry import load_target
from honeloom.runs.atomic import write_json
from honeloom.runs.journal import read_journal
from honeloom.stages.row_records import ROWS_FILE, write_questions
from honeloom.stages.rows import scan
from honeloom.stages.work import Outcome, Work
from honeloom.types.report import Check, Metric

__all__ = ["execute"]

Pair = tuple[torch.Tensor, torch.Tensor]
PARTITION, HOME = "partition.json", ".flower"
EXACT = ("flora", "fedex", "ffa", "rolora")
"""Rules whose aggregate is the weighted sum of the updates, up to rounding."""


def execute(work: Work[FederateConfig]) -> Outcome:
    """Run a federation."""
    config, found = work.config, work.inputs["model"]
    if found.base is not None:
        raise ConfigError(f"{found.value} is an adapter; merge it into its base first, with `honeloom merge`")
    tokenizer = load_tokenizer(found.paths[0])
    if tokenizer is None:
        raise SourceError(f"{found.value}: no tokenizer, so it cannot be tuned on rows; add tokenizer.json")
    connection = _connection(work)
    held = _rows(work)
    model = load_model(found.paths[0], loading=Loading.of(config))
    encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, config.max_length), train=True)
    here = {name: list(table) for name, table in held.items()} if config.engine == "inline" else {}
    port = FederatedModel(model, encoder, here, targets=config.targets, batch_size=config.batch_size)
    _check_ranks(config, port.modules)
    experiment = _experiment(work, port.modules)
    total = _finished(work)
    if total is None:
        total = _run(work, experiment, port, held, connection)
        _write(work, total, port.adapter_config())
    records = RoundStore.read(work.dir)
    if config.engine == "deployment":
        write_json(work.dir / PARTITION, {"sha256": None, "clients": _counted(records)})
    outcome = Outcome(
        "adapter", ".", _metrics(records), _verify(work, port, total, records, _probes(encoder, held)),
        _details(config, records), "adapter",
    )  # fmt: skip
    discard(work.dir / STATE)
    discard(work.dir / HOME)
    return outcome


def _connection(work: Work[FederateConfig]) -> Any:
    """Where the SuperLink of a deployment is."""
    config = work.config
    if config.engine != "deployment":
        return None
    link = config.superlink or SuperlinkConfig()
    roots = Path(link.root_certificates).expanduser().resolve() if link.root_certificates else None
    if roots is not None and not roots.is_file():
        raise ConfigError(f"superlink.root_certificates {link.root_certificates!r}: no such file")
    if roots is not None and (anybody := [c.id for c in config.members() if c.key is None]):
        work.log.warn(
            f"any node that the SuperLink lets in may say that it is {anybody[0]}"
            + (f" or one of {len(anybody) - 1} others" if anybody[1:] else "")
            + ": give clients the `key` of their nodes"
        )
    return load_target("honeloom.backends.flower.launch:Connection")(link.address, roots)


def _check_ranks(config: FederateConfig, modules: Mapping[str, tuple[int, int]]) -> None:
    most = max(min(shape) for shape in modules.values())
    for client in config.members():
        if client.largest_rank > most:
            raise ConfigError(
                f"client {client.id!r}: rank {client.largest_rank} is over {most}, the most that a matrix of the model "
                "can need; give a smaller one"
            )


def _finished(work: Work[FederateConfig]) -> dict[str, Pair] | None:
    """The update of an attempt that was interrupted after its last round, once what led to it is gone."""
    records = RoundStore.read(work.dir)
    if len(records) < work.config.rounds or (work.dir / STATE).exists():
        return None
    with LoraFile(work.dir) as file:
        return {
            module: (file.weights.read(f.b_name) * f.scale, file.weights.read(f.a_name))
            for module, f in file.factors.items()
        }


def _run(
    work: Work[FederateConfig], experiment: Experiment, port: FederatedModel, held: Mapping[str, RowSet],
    connection: Any,
) -> dict[str, Pair]:  # fmt: skip
    """Go through the rounds that are not done; the whole update."""
    config, store = work.config, RoundStore(work.dir)
    if done := store.load().round:
        work.log.say(f"federate: {done} of {config.rounds} rounds were done by an interrupted attempt")
    work.log.say(
        f"federate: {len(config.members())} clients, {config.rounds} rounds of {config.local_steps} steps, "
        f"{config.aggregation.type} ({config.starts} start), engine {config.engine}"
    )
    if config.engine == "inline":
        _run_inline(work, experiment, port, store)
    else:
        _run_on_flower(work, experiment, held, store, connection)
    if not any(record["applied"] for record in store.records()):
        raise HoneloomError("no round changed anything, so there is nothing to write; see rounds.jsonl")
    return _total(store.load().total(), port.modules)


def _experiment(work: Work[FederateConfig], modules: Mapping[str, tuple[int, int]]) -> Experiment:
    config, found = work.config, work.inputs["model"]
    # Nodes elsewhere find the base by its hub id; processes of this machine by its path.
    model = found.value if config.engine == "deployment" else str(found.paths[0])
    keys = {}
    for k, client in enumerate(config.clients):
        if client.key is not None:
            public_key_hex = load_target("honeloom.backends.flower.engine:public_key_hex")
            path = work.inputs[f"clients.{k}.key"].paths[0]
            try:
                keys[client.id] = public_key_hex(path.read_bytes())
            except ConfigError as error:
                raise ConfigError(f"key of client {client.id!r}, {path}: {error}") from None
    name = experiment_name(config, {place: i.fingerprint for place, i in work.inputs.items()})
    rows = str(work.dir / HOME / "rows") if config.engine == "simulation" else None
    return Experiment(name, config, modules, work.dir, model, found.fingerprint, rows, keys)


def _run_inline(
    work: Work[FederateConfig], experiment: Experiment, port: FederatedModel, store: RoundStore
) -> None:  # fmt: skip
    server = ServerCore(experiment.config, experiment.name, port.modules, store.load())
    engine = InlineEngine({name: ClientCore(name, port) for name in port.clients()})
    with one_thread(port.model.device):  # the server's sums are of the bits that travel
        run_rounds(server, engine, store, done=lambda r: _tell(work, r.to_json()))


def _run_on_flower(
    work: Work[FederateConfig], experiment: Experiment, held: Mapping[str, RowSet], store: RoundStore, connection: Any
) -> None:  # fmt: skip
    """Leave to Flower's processes what they need, start them, and tell what they write."""
    config, home = work.config, work.dir / HOME
    launch = load_target("honeloom.backends.flower.launch:run_app")
    discard(home)
    (home / "rows").mkdir(parents=True)
    for name, table in held.items():
        write_json(home / "rows" / f"{name}.json", _listed(table))
    experiment.write(home / "experiment.json")
    rounds = work.dir / ROUNDS
    told, events, seen = len(store.records()), 0, -1

    def tick() -> None:
        nonlocal told, events, seen
        said = list(read_journal(home / "events.jsonl"))
        for event in said[events:]:
            work.log.say(f"federate: {event['text']}")
        records = store.records() if _size(rounds) != seen else []
        for record in records[told:]:
            _tell(work, record)
        told, seen, events = max(told, len(records)), _size(rounds), len(said)

    gpus = 1 / config.parallel if config.engine == "simulation" and choose_device(config.device).type == "cuda" else 0.0
    launch(home, tick, connection=connection, nodes=len(config.members()), parallel=config.parallel, gpus=gpus)
    if len(store.records()) < config.rounds:
        raise HoneloomError(
            f"the run on Flower ended in round {len(store.records()) + 1} of {config.rounds}, without saying why; its "
            f"log is {home / 'run.log'}; go on with --resume"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _listed(table: RowSet) -> list[dict[str, Any]]:
    """Where a simulated client finds its rows: files, and lines in them."""
    return [{"file": {**asdict(f), "path": str(f.path)}, "lines": lines.tolist()} for f, lines in table.places()]


def _rows(work: Work[FederateConfig]) -> dict[str, RowSet]:
    """Rows of every client that are here, and the record of who has which."""
    config = work.config
    if config.engine == "deployment":
        return {}
    if config.partition is not None:
        table = scan(work)
        parts = partition(table, config.partition, seed=config.seed)
        write_json(work.dir / PARTITION, partition_record(table, parts))
        write_questions(work.dir / ROWS_FILE, table)
        return {name: table.take(places) for name, places in parts.items()}
    tables = {client.id: scan(work, field=f"clients.{k}.rows") for k, client in enumerate(config.clients)}
    records = [partition_record(table, {name: range(len(table))}) for name, table in tables.items()]
    clients = [client for record in records for client in record["clients"]]
    digest = hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()
    write_json(work.dir / PARTITION, {"sha256": digest, "clients": clients})
    write_questions(work.dir / ROWS_FILE, _Chained(tables))
    return tables


def _counted(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that stayed with their nodes nothing is known but their number."""
    counts = {c["id"]: c["rows"] for record in records for c in record["clients"] if c["status"] == "ok"}
    return [{"id": name, "rows": count} for name, count in counts.items()]


class _Chained:
    """The rows of all clients, one after the other."""

    def __init__(self, tables: Mapping[str, RowSet]) -> None:
        self._tables = tables

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    def __iter__(self) -> Any:
        return (row for table in self._tables.values() for row in table)


def _tell(work: Work[FederateConfig], record: Mapping[str, Any]) -> None:
    clients, number = record["clients"], record["round"]
    ok = [c for c in clients if c["status"] == "ok"]
    for client in clients:
        work.log.event("client", round=number, client=client["id"], status=client["status"], seconds=client["seconds"])
        if client["status"] != "ok":
            work.log.warn(f"round {number}: {client['id']} {client['status']}: {client['reason'] or 'no reply'}")
    if not record["applied"]:
        came = f"{len(ok)} of {len(clients)} clients replied"
        work.log.warn(f"round {number}: {record['reason'] or came}; nothing changed")
        return
    after = sum((c["loss_after"] or 0.0) * c["rows"] for c in ok) / sum(c["rows"] for c in ok)
    work.log.say(
        f"round {number}/{work.config.rounds}: {len(ok)} clients, loss {after:.4f}, rank {record['rank']}, "
        f"error {record['error']:.1e}"
    )


def _total(total: Mapping[str, Pair], modules: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """The whole update, with no more columns than a matrix of its shape can have."""
    found = {}
    for module, (b, a) in total.items():
        if b.shape[1] > min(modules[module]):
            b, a = compress(b, a)
        found[module] = (b.float().contiguous(), a.float().contiguous())
    return found


def _write(work: Work[FederateConfig], total: Mapping[str, Pair], like: Mapping[str, Any]) -> None:
    found = work.inputs["model"]
    base = found.value.partition("@")[0] if found.revision else str(found.published or found.paths[0])
    config = combined_config(
        [{**like, "base_model_name_or_path": base, "revision": found.revision}],
        {module: b.shape[1] for module, (b, _) in total.items()}, same=True,
    )  # fmt: skip
    tensors = [
        TensorStream.of(f"base_model.model.{module}.lora_{name}.weight", tensor)
        for module, pair in total.items()
        for name, tensor in zip("BA", pair, strict=True)
    ]
    write_adapter(work.dir, config, tensors)
    copy_tokenizer(found.paths[0], work.dir)


def _probes(encoder: Encoder, held: Mapping[str, RowSet]) -> list[list[int]]:
    """Token sequences on which models are compared: of the first client's rows, else of some plain text."""
    rows = [row for row in islice(next(iter(held.values()), ()), 4) if row.kind != "choice"]
    if rows:
        return [list(encoder.encode(row).ids) for row in rows]
    return [encoder.tokenizer.encode(text) for text in ("What is it that you do?", "Once upon a time there was a")]


def _verify(
    work: Work[FederateConfig], port: FederatedModel, total: Mapping[str, Pair], records: Sequence[Mapping[str, Any]],
    probes: Sequence[list[int]],
) -> tuple[Check, ...]:  # fmt: skip
    """Load the saved adapter and compare its logits with those of the model of the clients."""
    expected = row_logits(port.hold(total), probes)
    del port
    release_memory()
    again = load_model(work.dir, base=work.model(), loading=Loading.of(work.config))
    gap = largest_gap(expected, row_logits(again, probes))
    checks = [Check("the saved adapter gives the clients' logits (largest difference)", gap, 1e-4, gap <= 1e-4)]
    worst = max(record["error"] for record in records if record["applied"])
    if work.config.aggregation.type in EXACT:
        checks.append(
            Check("every aggregate is the weighted sum of the updates (relative error)", worst, 1e-5, worst <= 1e-5)
        )
    return tuple(checks)


def _metrics(records: Sequence[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """Loss of the clients on some of their own rows, weighted by rows: before the first round and after the last."""
    applied = [record for record in records if record["applied"]]
    found = []
    for name, record, key in (
        ("client_loss_first", applied[0], "loss_before"),
        ("client_loss_last", applied[-1], "loss_after"),
    ):
        ok = [c for c in record["clients"] if c["status"] == "ok" and c[key] is not None]
        if ok:
            mean = sum(c[key] * c["rows"] for c in ok) / sum(c["rows"] for c in ok)
            found.append(Metric(name, mean, len(ok), "nats/token", False, None, "all"))
    return tuple(found)


def _details(config: FederateConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As the contract has it."""
    clients = []
    for member in config.members():
        mine = {r["round"]: c for r in records for c in r["clients"] if c["id"] == member.id}
        seen = [mine.get(r["round"]) for r in records]
        last = [c for c in seen if c is not None]
        clients.append(
            {
                "id": member.id,
                "rank": last[-1]["rank"] if last else member.rank_in(1, 0),
                "rows": max((c["rows"] for c in last), default=0),
                "status": [c["status"] if c else "absent" for c in seen],
                "reasons": {
                    str(r["round"]): c["reason"] for r, c in zip(records, seen, strict=True) if c and c["reason"]
                },
                "bytes_up": sum(c["bytes_up"] for c in last),
                "bytes_down": sum(c["bytes_down"] for c in last),
                "lr": [c["lr"] if c else None for c in seen],
            }
        )
    return {
        "rounds": len(records),
        "global_sha256": records[-1]["sha256"],
        "epsilon": None,
        "privacy": {**asdict(exposure_of(config)), "secagg": False, "dp": None},
        "uplink": config.uplink,
        "engine": config.engine,
        "aggregation": config.aggregation.type,
        "start": config.starts,
        "relative_error": max((r["error"] for r in records if r["applied"]), default=None),
        "clients": clients,
    }
