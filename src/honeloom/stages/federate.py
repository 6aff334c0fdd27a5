"""`federate`: rows stay with their clients, and one adapter comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from honeloom.backends.devices import choose_device, one_thread
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.federated_model import FederatedModel
from honeloom.backends.hf.federated_port import open_port
from honeloom.backends.hf.federated_weights import FederatedWeights
from honeloom.checkpoint.folders import discard, read_config
from honeloom.data.rowset import RowSet
from honeloom.errors import CheckpointError, ConfigError, HoneloomError
from honeloom.federated.client import ClientCore
from honeloom.federated.experiment import Experiment, client_settings, experiment_name
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.federate_parts import SuperlinkConfig
from honeloom.federated.partition import partition, partition_record
from honeloom.federated.privacy import exposure_of
from honeloom.federated.rounds import InlineEngine, run_rounds
from honeloom.federated.server import ServerCore
from honeloom.federated.settling import read_measured, settle
from honeloom.federated.state import ServerState
from honeloom.federated.store import ROUNDS, STATE, RoundStore
from honeloom.planning.memory import peak_memory, read_decoder
from honeloom.registry import load_target
from honeloom.runs.atomic import write_json
from honeloom.runs.journal import read_journal
from honeloom.stages.federate_result import result_of
from honeloom.stages.needs import work_of
from honeloom.stages.row_records import ROWS_FILE, write_questions
from honeloom.stages.rows import scan
from honeloom.stages.work import Outcome, Work
from honeloom.types.report import Check, Metric

__all__ = ["execute"]

PARTITION, HOME = "partition.json", ".flower"
EXACT = ("flora", "fedex", "ffa", "rolora")
"""Rules whose aggregate is the weighted sum of the updates, up to rounding."""


def execute(work: Work[FederateConfig]) -> Outcome:
    """Run a federation."""
    config, found = work.config, work.inputs["model"]
    if found.base is not None:
        raise ConfigError(f"{found.value} is an adapter; merge it into its base first, with `honeloom merge`")
    connection = _connection(work)
    held = _rows(work)
    here = {name: list(table) for name, table in held.items()} if config.engine == "inline" else {}
    port = open_port(found.paths[0], client_settings(config), here, name=found.value)
    if config.method == "lora":
        _check_ranks(config, port.modules)
    if config.privacy.dp is not None:
        _check_noise(work, {name: port.rows(name) for name in port.clients()})
    result, experiment = result_of(work, port), _experiment(work, port.modules)
    if _finished(work):
        result.read()
    else:
        result.write(_run(work, experiment, port, held, connection))
    records = RoundStore.read(work.dir)
    if config.engine == "deployment":
        write_json(work.dir / PARTITION, {"sha256": None, "clients": _counted(records)})
    checks = result.verify(_probes(port.held.encoder, held)) + _exactness(config, records)
    outcome = Outcome(
        result.kind, ".", _metrics(records), tuple(checks),
        {**_details(work, records, {n: port.rows(n) for n in port.clients()}), **_costs(work, port)},
        result.relation,
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


def _check_noise(work: Work[FederateConfig], rows: Mapping[str, int]) -> None:
    """Refuse, before anything is trained, what the noise's accounting does not hold for."""
    config, dp = work.config, work.config.privacy.dp
    assert dp is not None  # the caller chose by it
    spent = []
    for name, count in rows.items():
        try:
            spent.append(_spent(config, count, config.rounds))
        except ConfigError as error:
            raise ConfigError(f"privacy.dp of client {name!r}, which has {count} rows: {error}") from None
    if spent:
        work.log.say(f"federate: epsilon {max(spent):.3g} at delta {dp.delta:g} for each row, by the end")
    if RoundStore.read(work.dir):
        work.log.warn("privacy.dp: a round that was interrupted is noised anew, and epsilon counts it once")


def _spent(config: FederateConfig, rows: int, rounds: int) -> float:
    """Epsilon of a client's rows over some rounds."""
    dp, mezo = config.privacy.dp, config.optimizer
    assert dp is not None and mezo.type == "mezo"  # the settings have seen to it
    if config.batch_size > rows:
        raise ConfigError(f"batch_size {config.batch_size} is more than there are; lower it")
    rate, steps = config.batch_size / rows, config.local_steps * rounds
    return _accounted(dp.noise, rate, steps, dp.delta, mezo.directions, rows)


@cache
def _accounted(noise: float, rate: float, steps: int, delta: float, directions: int, rows: int) -> float:
    """By the library; clients with as many rows have the same."""
    return float(load_target("honeloom.federated.dp:epsilon")(noise, rate, steps, delta, directions, rows=rows))


def _finished(work: Work[FederateConfig]) -> bool:
    """Whether an attempt was interrupted after its last round, once what led to its result is gone."""
    return len(RoundStore.read(work.dir)) >= work.config.rounds and not (work.dir / STATE).exists()


def _run(
    work: Work[FederateConfig], experiment: Experiment, port: FederatedModel | FederatedWeights,
    held: Mapping[str, RowSet], connection: Any,
) -> ServerState:  # fmt: skip
    """Go through the rounds that are not done; the state after the last."""
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
    return store.load()


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
    work: Work[FederateConfig], experiment: Experiment, port: FederatedModel | FederatedWeights, store: RoundStore
) -> None:  # fmt: skip
    engine = InlineEngine({name: ClientCore(name, port) for name in port.clients()})
    with one_thread(port.model.device):  # the server's sums are of the bits that travel
        config = settle(experiment.config, experiment.name, engine, store.folder)
        if experiment.config.measures:
            mu = getattr(config.optimizer, "mu", 0.0)
            work.log.say(f"federate: by what the clients measured, lr {config.learning_rate:.3g} and mu {mu:g}")
        server = ServerCore(config, experiment.name, port.modules, store.load())
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
        split = partition(table, config.partition, seed=config.seed)
        parts = {name: places for name, places in split.items() if name not in config.without}
        write_json(work.dir / PARTITION, partition_record(table, parts))
        write_questions(work.dir / ROWS_FILE, table.take(i for places in parts.values() for i in places))
        return {name: table.take(places) for name, places in parts.items()}
    asked = [(k, client.id) for k, client in enumerate(config.clients) if client.id not in config.without]
    tables = {name: scan(work, field=f"clients.{k}.rows") for k, name in asked}
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
    told = [c for c in ok if c["loss_after"] is not None]
    after = sum(c["loss_after"] * c["rows"] for c in told) / sum(c["rows"] for c in told) if told else None
    loss = "" if after is None else f", loss {after:.4f}"
    exact = "" if record["error"] is None else f", rank {record['rank']}, error {record['error']:.1e}"
    work.log.say(f"round {number}/{work.config.rounds}: {len(ok)} clients{loss}{exact}")


def _probes(encoder: Encoder, held: Mapping[str, RowSet]) -> list[list[int]]:
    """Token sequences on which models are compared: of the first client's rows, else of some plain text."""
    rows = [row for row in islice(next(iter(held.values()), ()), 4) if row.kind != "choice"]
    if rows:
        return [list(encoder.encode(row).ids) for row in rows]
    return [encoder.tokenizer.encode(text) for text in ("What is it that you do?", "Once upon a time there was a")]


def _exactness(config: FederateConfig, records: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Of rules that promise it: that aggregates are sums of updates."""
    measured = [record["error"] for record in records if record["applied"] and record["error"] is not None]
    if config.aggregation.type not in EXACT or not measured:
        return []
    worst = max(measured)
    return [Check("every aggregate is the weighted sum of the updates (relative error)", worst, 1e-5, worst <= 1e-5)]


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


def _costs(work: Work[FederateConfig], port: FederatedModel | FederatedWeights) -> dict[str, Any]:
    """What tensors would have cost to send, and gradients to have: bytes by client, and estimated peaks of memory."""
    config, settings = work.config, read_config(work.model())
    full, on_gpu = config.method == "full", port.model.device.type == "cuda"
    widths = sum(m * n if full else m + n for m, n in port.modules.values())
    sizes = {c.id: 4 * widths * (1 if full else c.largest_rank) for c in config.members()}
    found: dict[str, Any] = {"tensor_bytes": sizes}
    if config.optimizer.type != "mezo":
        return found
    try:
        decoder, job = read_decoder(settings), work_of(config, settings, gpu=on_gpu)
    except CheckpointError:  # a family without known sizes
        return found
    rank = max(c.largest_rank for c in config.members())
    backward = replace(job, mode="full" if full else "lora", rank=rank, states=2)
    jobs = {"inference": replace(job, mode="inference"), "zeroth-order": job, "backpropagation, AdamW": backward}
    memory = {name: peak_memory(decoder, one).total for name, one in jobs.items()}
    if full:  # the base, from which every round begins
        memory["zeroth-order"] += 4 * decoder.parameters
    return {**found, "memory": memory}


def _details(
    work: Work[FederateConfig], records: Sequence[Mapping[str, Any]], known: Mapping[str, int]
) -> dict[str, Any]:
    """As the contract has it; `known` is how many rows clients have that are here."""
    config = work.config
    clients: list[dict[str, Any]] = []
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
        if config.privacy.dp is not None:  # whoever was asked may have told its scalars, refused or late as they came
            count = clients[-1]["rows"] or known.get(member.id, 0)
            clients[-1]["epsilon"] = _spent(config, count, len(last)) if count else None
    spent = [c["epsilon"] for c in clients if c.get("epsilon") is not None]
    return {
        "rounds": len(records),
        "global_sha256": records[-1]["sha256"],
        "epsilon": max(spent, default=None),
        "privacy": {**asdict(exposure_of(config)), **config.privacy.model_dump(mode="json", exclude={"mode"})},
        "uplink": config.uplink,
        "engine": config.engine,
        "aggregation": config.aggregation.type,
        "start": config.starts,
        "method": config.method,
        "rates": config.rates.model_dump(mode="json"),
        "measured": read_measured(work.dir) or None,
        "relative_error": max((r["error"] for r in records if r["applied"] and r["error"] is not None), default=None),
        "clients": clients,
    }
