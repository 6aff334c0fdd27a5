"""`federate`: rows stay with their clients, and one adapter comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from honeloom.backends.devices import one_thread, release_memory
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.compare import largest_gap, row_logits
from honeloom.backends.hf.federated_model import FederatedModel
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.checkpoint.adapter_writer import combined_config, write_adapter
from honeloom.checkpoint.folders import copy_tokenizer, discard
from honeloom.checkpoint.writer import TensorStream
from honeloom.data.rowset import RowSet
from honeloom.errors import ConfigError, HoneloomError, SourceError
from honeloom.federated.client import ClientCore
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.partition import partition, partition_record
from honeloom.federated.rounds import InlineEngine, run_rounds
from honeloom.federated.server import RoundRecord, ServerCore
from honeloom.federated.store import STATE, RoundStore
from honeloom.ops.lowrank import compress
from honeloom.runs.atomic import canonical_json, write_json
from honeloom.stages.row_records import ROWS_FILE, write_questions
from honeloom.stages.rows import scan
from honeloom.stages.work import Outcome, Work
from honeloom.types.report import Check, Metric
from honeloom.types.rows import Row

__all__ = ["execute"]

Pair = tuple[torch.Tensor, torch.Tensor]
PARTITION = "partition.json"
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
    rows = _rows(work)
    model = load_model(found.paths[0], loading=Loading.of(config))
    encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, config.max_length), train=True)
    port = FederatedModel(model, encoder, rows, targets=config.targets, batch_size=config.batch_size)
    store = RoundStore(work.dir)
    state = store.load()
    if state.round:
        work.log.say(f"federate: {state.round} of {config.rounds} rounds were done by an interrupted attempt")
    server = ServerCore(config, _experiment(work), port.modules, state)
    work.log.say(
        f"federate: {len(rows)} clients, {sum(map(port.rows, rows))} rows, {config.rounds} rounds of "
        f"{config.local_steps} steps, {config.aggregation.type} ({config.starts} start)"
    )
    engine = InlineEngine({name: ClientCore(name, port) for name in rows})
    with one_thread(port.model.device):  # the server's sums are of the bits that travel
        run_rounds(server, engine, store, done=lambda record: _tell(work, record, config.rounds))
    records = store.records()
    if not any(record["applied"] for record in records):
        raise HoneloomError("no round had replies of enough clients, so there is nothing to write; see rounds.jsonl")
    total = _total(server.state.total(), port.modules)
    _write(work, total, port.adapter_config())
    checks = _verify(work, port, total, records, encoder, rows)
    discard(work.dir / STATE)
    return Outcome("adapter", ".", _metrics(records), checks, _details(server, records), "adapter")


def _rows(work: Work[FederateConfig]) -> dict[str, list[Row]]:
    """Rows of every client, and the record of who has which."""
    config = work.config
    if config.partition is not None:
        table = scan(work)
        parts = partition(table, config.partition, seed=config.seed)
        write_json(work.dir / PARTITION, partition_record(table, parts))
        write_questions(work.dir / ROWS_FILE, table)
        place = {i: name for name, places in parts.items() for i in places}
        found: dict[str, list[Row]] = {name: [] for name in parts}
        for i, row in enumerate(table):
            found[place[i]].append(row)
        return found
    tables = {client.id: scan(work, field=f"clients.{k}.rows") for k, client in enumerate(config.clients)}
    records = [partition_record(table, {name: range(len(table))}) for name, table in tables.items()]
    clients = [client for record in records for client in record["clients"]]
    digest = hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()
    write_json(work.dir / PARTITION, {"sha256": digest, "clients": clients})
    write_questions(work.dir / ROWS_FILE, _Chained(tables))
    return {name: list(table) for name, table in tables.items()}


class _Chained:
    """The rows of all clients, one after the other."""

    def __init__(self, tables: Mapping[str, RowSet]) -> None:
        self._tables = tables

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    def __iter__(self) -> Any:
        return (row for table in self._tables.values() for row in table)


def _experiment(work: Work[FederateConfig]) -> str:
    """A name that settings and inputs decide, so that an interrupted federation goes on under it."""
    inputs = {place: found.fingerprint for place, found in work.inputs.items()}
    text = canonical_json({"config": work.config.model_dump(mode="json", exclude={"engine"}), "inputs": inputs})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tell(work: Work[FederateConfig], record: RoundRecord, rounds: int) -> None:
    ok = [c for c in record.clients if c.status == "ok"]
    for client in record.clients:
        work.log.event("client", round=record.round, client=client.id, status=client.status, seconds=client.seconds)
        if client.status != "ok":
            work.log.warn(f"round {record.round}: {client.id} {client.status}: {client.reason or 'no reply'}")
    if not record.applied:
        work.log.warn(f"round {record.round}: {len(ok)} of {len(record.clients)} clients replied; nothing changed")
        return
    after = sum((c.loss_after or 0.0) * c.rows for c in ok) / sum(c.rows for c in ok)
    work.log.say(
        f"round {record.round}/{rounds}: {len(ok)} clients, loss {after:.4f}, rank {record.rank}, "
        f"error {record.error:.1e}"
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


def _verify(
    work: Work[FederateConfig], port: FederatedModel, total: Mapping[str, Pair], records: Sequence[Mapping[str, Any]],
    encoder: Encoder, rows: Mapping[str, Sequence[Row]],
) -> tuple[Check, ...]:  # fmt: skip
    """Load the saved adapter and compare its logits with those of the model of the clients."""
    first = next(iter(rows.values()))
    probes = [list(encoder.encode(row).ids) for row in first[:4] if row.kind != "choice"]
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
        mean = sum(c[key] * c["rows"] for c in ok) / sum(c["rows"] for c in ok)
        found.append(Metric(name, mean, len(ok), "nats/token", False, None, "all"))
    return tuple(found)


def _details(server: ServerCore, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As the contract has it."""
    clients = []
    for member in server.members.values():
        mine = {r["round"]: c for r in records for c in r["clients"] if c["id"] == member.id}
        seen = [mine.get(r["round"]) for r in records]
        last = [c for c in seen if c is not None]
        clients.append(
            {
                "id": member.id,
                "rank": last[-1]["rank"] if last else server.rank(member),
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
        "aggregation": server.config.aggregation.type,
        "start": server.config.starts,
        "relative_error": max((r["error"] for r in records if r["applied"]), default=None),
        "clients": clients,
    }
