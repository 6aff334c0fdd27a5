"""Rounds: partitions, messages, server and clients on a model whose training is known, and through the door."""

import json
import math
import re

import numpy as np
import pytest
import torch

import honeloom
from honeloom.config.base import validate
from honeloom.errors import ConfigError, HoneloomError, MessageError, RowsError
from honeloom.federated import METHODS
from honeloom.federated.client import ClientCore, ClientMemory, fresh_factors, split_shared
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.federate_parts import PartitionConfig
from honeloom.federated.frozen import FrozenAdditions, folded, stacked
from honeloom.federated.messages import (
    Manifest,
    TrainReply,
    TrainTask,
    decode_reply,
    decode_task,
    encode,
)  # fmt: skip
from honeloom.federated.partition import partition, partition_record
from honeloom.federated.privacy import MODES, exposure_of, mode_of
from honeloom.federated.rounds import InlineEngine, Silence, run_rounds
from honeloom.federated.server import ServerCore
from honeloom.federated.shares import capped, outliers
from honeloom.federated.store import RoundStore
from honeloom.runs import atomic
from honeloom.testing.fakes import FakeRows, chat_row
from honeloom.types.federation import LocalResult

MODULES = {"layers.0.q": (6, 5), "layers.1.q": (4, 7)}


class Descent:
    """A LocalPort: a client pulls the whole update of every module towards a target of its own, by gradient steps."""

    modules = MODULES

    def __init__(self, targets, rows):
        self.targets, self.counts, self.jobs = targets, rows, []

    def rows(self, client):
        return self.counts[client]

    def train(self, job):
        self.jobs.append(job)
        found, before, after = {}, 0.0, 0.0
        for module, (b, a) in job.start.items():
            b, a = b.clone().double(), a.clone().double()
            frozen = job.frozen.get(module)
            base = torch.zeros(MODULES[module]).double() if frozen is None else (frozen[0] @ frozen[1]).double()
            target = self.targets[job.client][module].double()
            before += float((base + job.scale * b @ a - target).square().sum())
            for _ in range(int(job.settings["steps"])):
                gap = base + job.scale * b @ a - target
                db, da = job.scale * gap @ a.T, job.scale * b.T @ gap
                if job.trains != "a":
                    b = b - job.settings["lr"] * db
                if job.trains != "b":
                    a = a - job.settings["lr"] * da
            after += float((base + job.scale * b @ a - target).square().sum())
            found[module] = (b.float(), a.float())
        return LocalResult(found, {"loss_before": before, "loss_after": after})


def settings(**changes):
    given = {"model": "m", "rows": "x", "partition": {"type": "iid", "n": 3}, "ranks": [3, 2, 1], "rounds": 3,
             "local_steps": 40, "lr": 0.05, "aggregation": {"type": "svd", "rank": 4}, **changes}  # fmt: skip
    return validate(FederateConfig, given, what="test")


def world(config):
    generator = torch.Generator().manual_seed(1)
    names = [client.id for client in config.members()]
    targets = {name: {m: torch.randn(s, generator=generator) for m, s in MODULES.items()} for name in names}
    port = Descent(targets, {name: 10 * (k + 1) for k, name in enumerate(names)})
    return port, {name: ClientCore(name, port) for name in names}


def federate(tmp_path, config=None, engine=None, **changes):
    config = config or settings(**changes)
    port, clients = world(config)
    store = RoundStore(tmp_path)
    server = ServerCore(config, "test", MODULES, store.load())
    run_rounds(server, (engine or InlineEngine)(clients), store)
    return server, store.records(), port


def dense(pairs, module):
    return (pairs[module][0] @ pairs[module][1]).double()


def distance(server, port):
    """Of the global update from the mean target, beside where it began."""
    shares = {name: port.counts[name] / sum(port.counts.values()) for name in port.targets}
    gaps, sizes = 0.0, 0.0
    for module in MODULES:
        mean = sum(shares[name] * port.targets[name][module].double() for name in shares)
        gaps += float((dense(server.state.total(), module) - mean).square().sum())
        sizes += float(mean.square().sum())
    return math.sqrt(gaps / sizes)


# partitions


def table(count=120):
    return FakeRows([chat_row(f"r{i:03}", f"q {i}", "a", domain=f"d{i % 7 % 5}") for i in range(count)])


@pytest.mark.parametrize("how", ["iid", "size", "domain", "dirichlet"])
def test_a_partition_gives_every_row_to_one_client(how):
    rows = table()
    parts = partition(rows, PartitionConfig(type=how, n=4), seed=3)
    assert list(parts) == [f"client-{k}" for k in range(4)]
    assert sorted(i for places in parts.values() for i in places) == list(range(120))
    assert all(places == sorted(places) and places for places in parts.values())
    assert partition(rows, PartitionConfig(type=how, n=4), seed=3) == parts
    if how != "domain":
        assert partition(rows, PartitionConfig(type=how, n=4), seed=4) != parts
    sizes = [len(places) for places in parts.values()]
    if how == "iid":
        assert sizes == [30] * 4
    if how == "size":
        assert sizes == [58, 28, 20, 14]  # 1, 1/2, 1/3, 1/4 of 57.6, ends rounded
    if how == "domain":
        held = [{rows.domains[i] for i in places} for places in parts.values()]
        assert all(not a & b for k, a in enumerate(held) for b in held[:k])


def test_a_partition_does_not_depend_on_the_order_of_the_rows():
    rows = table()
    turned = FakeRows(list(rows)[::-1])
    for how in ("iid", "size", "dirichlet"):
        one = partition(rows, PartitionConfig(type=how, n=4), seed=3)
        other = partition(turned, PartitionConfig(type=how, n=4), seed=3)
        assert {k: {rows.ids[i] for i in v} for k, v in one.items()} == {
            k: {turned.ids[i] for i in v} for k, v in other.items()
        }


def test_alpha_makes_clients_alike_or_different():
    rows = table(1000)

    def spread(alpha):
        parts = partition(rows, PartitionConfig(type="dirichlet", n=4, alpha=alpha), seed=0)
        shares = np.array(
            [[sum(rows.domains[i] == f"d{d}" for i in p) / len(p) for d in range(5)] for p in parts.values()]
        )
        return float(shares.std(axis=0).mean())

    assert spread(100.0) < 0.03 < 0.15 < spread(0.1)


def test_a_partition_record_names_rows_and_hashes_them():
    rows = table(8)
    record = partition_record(rows, {"client-0": [0, 2], "client-1": [1]})
    assert record["clients"][0] == {"id": "client-0", "rows": 2, "domains": {"d0": 1, "d2": 1}, "ids": ["r000", "r002"]}
    assert record["sha256"] != partition_record(rows, {"client-0": [0], "client-1": [1, 2]})["sha256"]


def test_partitions_that_cannot_be_are_refused():
    with pytest.raises(RowsError, match="3 rows for 4 clients"):
        partition(table(3), PartitionConfig(n=4), seed=0)
    with pytest.raises(RowsError, match="the rows have 5 domains"):
        partition(table(), PartitionConfig(type="domain", n=6), seed=0)
    with pytest.raises(RowsError, match="no row names a domain"):
        partition(FakeRows([chat_row(str(i), "q", "a") for i in range(9)]), PartitionConfig(type="domain", n=2), seed=0)


# messages


def reply(rank=2, **changes):
    factors = {m: (torch.ones(s[0], rank), torch.ones(rank, s[1])) for m, s in MODULES.items()}
    return TrainReply(
        **{"experiment": "test", "round": 1, "client": "client-0", "rows": 5, "factors": factors} | changes
    )


def test_messages_survive_the_wire():
    task = TrainTask("test", 2, "client-1", 4, 8.0, "carry", "b", True, 1, 3, {"lr": 0.1, "optimizer": {"type": "sgd"}},
                     shared={"m": (torch.randn(3, 4), torch.randn(4, 5).bfloat16().float())},
                     frozen={"m": (torch.randn(3, 1).bfloat16(), torch.randn(1, 5).bfloat16())})  # fmt: skip
    data = encode(task)
    back = decode_task(data)
    assert encode(back) == data
    assert back.frozen["m"][0].dtype is torch.bfloat16 and torch.equal(back.shared["m"][0], task.shared["m"][0])
    sent = reply(metrics={"loss_after": 0.25}, version=3)
    again = decode_reply(encode(sent), Manifest.of(MODULES, 2))
    assert again.metrics == sent.metrics and again.version == 3
    assert all(torch.equal(x, y) for m in MODULES for x, y in zip(again.factors[m], sent.factors[m], strict=True))


def padded(data, old, new):
    """Another header of the right length."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(old, new)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (lambda: b"", "not a message"),
        (lambda: b"\xff" * 64, "not a message"),
        (lambda: encode(reply())[:-40], "not a message"),
        (lambda: encode(reply(rank=3)), "bytes, and at most|expected"),
        (lambda: encode(reply(factors={"other": (torch.ones(2, 2), torch.ones(2, 2))})), "was not agreed"),
        (lambda: encode(reply(factors={})), "no factors for 2 modules"),
        (lambda: encode(reply(factors={m: (torch.ones(1, 2), torch.ones(2, 1)) for m in MODULES})), "has shape"),
        (lambda: encode(reply(rows=-1)), "rows is -1"),
        (lambda: encode(reply(rows=True)), "rows is True"),
        (
            lambda: encode(reply(metrics={"x": 0.0})).replace(b"+0.00000000e+00", b"zero" + b" " * 11),
            "no number",
        ),
        (lambda: encode(reply(factors={"layers.0.q": (torch.ones(6, 2).double(), torch.ones(2, 5))})), "F64"),
        (lambda: encode(reply(metrics={"x": math.nan})), "NaN or infinity"),
        (lambda: padded(encode(reply()), b'\\"rows\\":5', b'\\"arrays\\":{},\\"rows\\":5'), "fields|not a message"),
        (lambda: padded(encode(reply()), b'\\"rows\\":5', b'\\"rows\\":-1' + b"0" * 400), "rows is -1"),
        (lambda: padded(encode(reply()), b'\\"rows\\":5', b'\\"rows\\":1' + b"0" * 5000), "not a message"),
        (lambda: encode(reply()).replace(b'\\"protocol\\":2', b'\\"protocol\\":9'), "not of protocol 2"),
        (lambda: encode(reply()).replace(b"factors|", b"control|"), "was not agreed"),
    ],
)
def test_hostile_replies_are_refused_before_their_tensors_are_read(bad, what):
    with pytest.raises(MessageError, match=what):
        decode_reply(bad(), Manifest.of(MODULES, 2))


# where clients begin


def test_a_carried_start_and_its_rest_are_the_whole_update():
    shared = {m: (torch.randn(s[0], 4), torch.randn(4, s[1])) for m, s in MODULES.items()}
    for rank in (1, 3, 4, 6):
        start, rest = split_shared(shared, MODULES, rank, 2.0, keep=True)
        for module in MODULES:
            total = 2.0 * start[module][0] @ start[module][1]
            if module in rest:
                total = total + rest[module][0] @ rest[module][1]
            assert start[module][0].shape[1] == rank
            assert torch.allclose(total, shared[module][0] @ shared[module][1], atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_nests():
    large, small = fresh_factors(MODULES, 5, 1, "x"), fresh_factors(MODULES, 2, 1, "x")
    for module, (m, n) in MODULES.items():
        assert not large[module][0].any() and large[module][0].shape == (m, 5)
        assert torch.equal(large[module][1][:2], small[module][1])
        assert float(large[module][1].abs().max()) <= 1 / math.sqrt(n)
    assert not torch.equal(fresh_factors(MODULES, 2, 1, "y")["layers.0.q"][1], small["layers.0.q"][1])


# rounds


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("flora", {"rounds": 6}), ("svd", {"rounds": 6}), ("svd", {"rounds": 6, "start": "reset"}),
        ("flexlora", {"rounds": 6}), ("zero_pad", {"rounds": 6}),
        ("fedit", {"ranks": 3, "rounds": 6}), ("fedex", {"ranks": 3, "rounds": 6}), ("ffa", {"ranks": 3, "rounds": 6}),
        ("rolora", {"ranks": 3, "rounds": 6, "lr": 0.01}),
    ],
)  # fmt: skip
def test_every_rule_goes_on_round_by_round(tmp_path, rule, changes):
    server, records, port = federate(tmp_path, aggregation=rule, **changes)
    assert [r["round"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert all(r["applied"] and c["status"] == "ok" for r in records for c in r["clients"])
    assert distance(server, port) < 0.95
    if rule in ("flora", "fedex", "ffa", "rolora"):
        assert max(r["error"] for r in records) < 1e-6
    if rule == "rolora":
        trains = [job.trains for job in port.jobs]
        assert trains == ["b"] * 3 + ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3 + ["a"] * 3
    if rule == "ffa":
        assert {job.trains for job in port.jobs} == {"b"}


def test_stacking_is_the_sum_of_what_clients_changed_by_hand(tmp_path):
    server, records, port = federate(tmp_path, aggregation="flora", rounds=2)
    expected = {m: torch.zeros(s).double() for m, s in MODULES.items()}
    for job, record in zip(port.jobs, [c for r in records for c in r["clients"]], strict=True):
        again = Descent(port.targets, port.counts).train(job)
        for module, pair in again.factors.items():
            expected[module] += record["rows"] / 60 * job.scale * dense({module: pair}, module)
    for module in MODULES:
        assert torch.allclose(dense(server.state.total(), module), expected[module], atol=1e-5)
    assert [r["rank"] for r in records] == [6, 6]
    assert {m: b.shape[1] for m, (b, _) in server.state.total().items()} == {m: min(s) for m, s in MODULES.items()}


def random_pairs(rank, seed):
    draw = torch.Generator().manual_seed(seed)
    return {k: (torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))
            for k, (m, n) in MODULES.items()}  # fmt: skip


def test_frozen_additions_do_not_grow_with_the_rounds_and_everybody_holds_the_same():
    kept, exact = FrozenAdditions(), {m: torch.zeros(s).double() for m, s in MODULES.items()}
    held = {"every": (0, {}), "second": (0, {}), "third": (0, {}), "late": (0, {})}
    whole = 0
    for number in range(1, 25):
        addition = random_pairs(1, number)
        kept.add(addition)
        exact = {m: exact[m] + dense(addition, m) for m in MODULES}
        assert kept.version == number
        assert all(b.shape[1] <= min(b.shape[0], a.shape[1]) for b, a in kept.total().values())
        for name, step in (("every", 1), ("second", 2), ("third", 3), ("late", 24)):
            if number % step:
                continue
            version, mine = held[name]
            since, more = kept.after(version)
            assert since in (0, version)
            whole += name == "every" and since == 0
            held[name] = (kept.version, folded(stacked(mine if since else {}, more)))
            for module, pair in kept.total().items():  # to the last bit
                assert all(torch.equal(x, y) for x, y in zip(pair, held[name][1][module], strict=True))
    for module in MODULES:
        assert torch.allclose(dense(kept.total(), module), exact[module], atol=1e-5)
    assert whole == 1  # who is always there is sent every addition once, and never the whole again
    assert kept.until(24)[0] == kept.until(23)[0] == 24 and kept.until(1) == (0, {})
    assert kept.after(99)[0] == 0  # a version that does not exist is answered with the whole


def test_what_clients_have_of_the_base_is_what_the_server_holds(tmp_path):
    """Warm starts differ by rank, and yet all clients begin at the same whole update."""
    _, _, port = federate(tmp_path, aggregation={"type": "svd", "rank": 5}, rounds=2)
    for module in MODULES:
        begun = []
        for job in port.jobs[3:]:
            whole = job.scale * dense(job.start, module)
            begun.append(whole + dense(job.frozen, module) if module in job.frozen else whole)
        assert all(torch.allclose(begun[0], other, atol=1e-5) for other in begun[1:])
        assert float(begun[0].abs().max()) > 0.1


def test_clients_join_leave_and_change_rank(tmp_path):
    clients = [
        {"id": "client-0", "rank": {1: 3, 3: 1}},
        {"id": "client-1", "joins": 2},
        {"id": "client-2", "leaves": 3},
    ]
    server, records, port = federate(tmp_path, aggregation="flora", rounds=4, clients=clients)
    assert [[c["id"] for c in r["clients"]] for r in records] == [
        ["client-0", "client-2"], ["client-0", "client-1", "client-2"], ["client-0", "client-1"],
        ["client-0", "client-1"],
    ]  # fmt: skip
    assert [r["clients"][0]["rank"] for r in records] == [3, 3, 1, 1]
    assert [r["rank"] for r in records] == [4, 6, 3, 3]
    late = next(job for job in port.jobs if job.client == "client-1")
    assert late.frozen["layers.0.q"][0].shape[1] == 4  # what the others had already
    assert max(r["error"] for r in records) < 1e-6 and server.state.round == 4


def test_a_part_of_the_clients_is_asked(tmp_path):
    _, records, _ = federate(tmp_path, participation=0.5, rounds=5, aggregation="flora")
    asked = [[c["id"] for c in r["clients"]] for r in records]
    assert all(len(names) == 2 for names in asked) and len({tuple(names) for names in asked}) > 1


class Faulty(InlineEngine):
    """Sends something else for one client in round 2."""

    fault = staticmethod(lambda name, data: data)

    def exchange(self, tasks, deadline, needed):
        for name, data in super().exchange(tasks, deadline, needed):
            number = decode_task(tasks[name]).round
            yield name, type(self).fault(name, data) if number == 2 and name == "client-1" else data


def spoiled(change):
    def fault(name, data):
        found = decode_reply(data, Manifest.of(MODULES, 2))
        return encode(change(found))

    return fault


def with_factors(found, change):
    factors = {m: change(b.clone(), a.clone()) for m, (b, a) in found.factors.items()}
    return TrainReply(
        found.experiment, found.round, found.client, found.rows, found.version, found.metrics, factors=factors
    )


FAULTS = {
    "silent": (lambda name, data: Silence("no reply within 1 s"), "absent", "no reply within 1 s"),
    "nan": (spoiled(lambda f: with_factors(f, lambda b, a: (b * math.nan, a))), "rejected", "NaN or infinity"),
    "shape": (spoiled(lambda f: with_factors(f, lambda b, a: (b[:, :1], a[:1]))), "rejected", "has shape"),
    "huge": (spoiled(lambda f: with_factors(f, lambda b, a: (b * 1e4, a))), "rejected", "times"),
    "garbage": (lambda name, data: b"hello", "rejected", "not a message"),
    "old": (spoiled(lambda f: TrainReply("test", 1, f.client, f.rows, factors=f.factors)), "late", "of round 1"),
    "other": (spoiled(lambda f: TrainReply("else", 2, f.client, f.rows, factors=f.factors)), "rejected", "another"),
    "mask": (spoiled(lambda f: TrainReply("test", 2, "client-2", 5, factors=f.factors)), "rejected", "answered as"),
    "error": (spoiled(lambda f: TrainReply("test", 2, f.client, error="out of memory")), "rejected", "out of memory"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_costs_its_client_and_nobody_else(tmp_path, fault):
    change, status, reason = FAULTS[fault]
    engine = type("Engine", (Faulty,), {"fault": staticmethod(change)})
    server, records, _ = federate(tmp_path, aggregation="flora", rounds=3, engine=engine)
    hurt = records[1]["clients"][1]
    assert hurt["status"] == status and reason in hurt["reason"]
    assert [c["status"] for c in records[1]["clients"]].count("ok") == 2 and records[1]["applied"]
    assert all(c["status"] == "ok" for r in (records[0], records[2]) for c in r["clients"])
    # the others' part is what it is without that client in that round
    other = tmp_path / "without"
    other.mkdir()
    silent = type("Engine", (Faulty,), {"fault": staticmethod(FAULTS["silent"][0])})
    assert federate(other, aggregation="flora", rounds=3, engine=silent)[0].state.sha256() == server.state.sha256()


def test_too_few_replies_change_nothing_and_end_in_the_end(tmp_path):
    class Deaf(InlineEngine):
        def exchange(self, tasks, deadline, needed):
            yield from ((name, Silence("gone")) for name in tasks)

    with pytest.raises(HoneloomError, match=r"3 rounds in a row .*client-0: gone.*--resume"):
        federate(tmp_path, rounds=4, engine=Deaf)
    assert not RoundStore(tmp_path).records()  # none of them is spent
    server, records, _ = federate(tmp_path, rounds=4)
    (tmp_path / "straight").mkdir()
    straight, lines, _ = federate(tmp_path / "straight", rounds=4)
    assert server.state.sha256() == straight.state.sha256() and len(records) == len(lines) == 4


def test_empty_rounds_stand_in_the_record_once_a_later_one_changes_something(tmp_path):
    class DeafAtFirst(InlineEngine):
        def exchange(self, tasks, deadline, needed):
            if decode_task(next(iter(tasks.values()))).round < 3:
                yield from ((name, Silence("gone")) for name in tasks)
            else:
                yield from super().exchange(tasks, deadline, needed)

    _, records, _ = federate(tmp_path, rounds=4, engine=DeafAtFirst)
    assert [r["applied"] for r in records] == [False, False, True, True]


class Forgetful(InlineEngine):
    """Its clients are new processes in round 3, as after a kill of whatever carried the messages."""

    def exchange(self, tasks, deadline, needed):
        if decode_task(next(iter(tasks.values()))).round == 3 and not getattr(self, "forgot", False):
            self.forgot = True
            for client in self.clients.values():
                client.memory = ClientMemory()
        yield from super().exchange(tasks, deadline, needed)


@pytest.mark.parametrize("changes", [{"aggregation": "flora"}, {"aggregation": "fedex", "ranks": 2}])
def test_clients_that_lost_what_they_held_get_all_of_it_in_the_same_round(tmp_path, changes):
    for name, engine in (("whole", InlineEngine), ("lost", Forgetful)):
        (tmp_path / name).mkdir()
        server, records, _ = federate(tmp_path / name, engine=engine, rounds=4, **changes)
        assert all(c["status"] == "ok" for r in records for c in r["clients"])
        if name == "whole":
            expected = server.state.sha256()
    assert server.state.sha256() == expected


class Anew(InlineEngine):
    """As Flower: a new run's clients hold nothing."""

    def restore(self, state):
        state.held.clear()


@pytest.mark.parametrize("after", [3, 4, 5, 6, 7, 8])
def test_an_engine_whose_clients_forget_resumes_to_the_same_bytes(tmp_path, after):
    (tmp_path / "whole").mkdir()
    whole, _, _ = federate(tmp_path / "whole", aggregation="flora")
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "cut", engine=type("E", (Dying,), {"left": after}), aggregation="flora")
    again, records, _ = federate(tmp_path / "cut", engine=Anew, aggregation="flora")
    assert again.state.sha256() == whole.state.sha256()
    assert all(c["status"] == "ok" for r in records for c in r["clients"])


def hostile(tmp_path, change, number=2, count=3, **changes):
    """A federation in which client-1 sends something else in one round."""

    class Engine(InlineEngine):
        def exchange(self, tasks, deadline, needed):
            for name, data in super().exchange(tasks, deadline, needed):
                task = decode_task(tasks[name])
                spoilt = name == "client-1" and task.round == number
                yield name, encode(change(decode_reply(data, Manifest.of(MODULES, task.rank)))) if spoilt else data

    ranks = {"ranks": [2] * count, "partition": {"type": "iid", "n": count}}
    return federate(tmp_path, engine=Engine, **{"rounds": 3, **ranks, **changes})


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_a_factor_that_was_to_stay_must_stay(tmp_path, rule):
    def change(found):
        return with_factors(found, lambda b, a: (b, a + 1) if rule == "ffa" else (b + 1, a))

    _, records, _ = hostile(tmp_path, change, aggregation=rule, lr=0.01)
    hurt = records[1]["clients"][1]
    assert hurt["status"] == "rejected" and "was to stay as it was sent" in hurt["reason"]
    assert all(r["applied"] for r in records)


@pytest.mark.parametrize("rule", ["flora", "svd", "fedex", "fedit"])
@pytest.mark.parametrize("number", [1, 2])
def test_of_two_replies_a_huge_one_neither_ends_nor_poisons_the_federation(tmp_path, rule, number):
    server, records, _ = hostile(
        tmp_path, lambda f: with_factors(f, lambda b, a: (b + 3e38, a)), number, 2, aggregation=rule, quorum=0.5
    )
    hurt = records[number - 1]["clients"][1]
    assert hurt["status"] == "rejected" and "too large" in hurt["reason"]
    assert all(bool(torch.isfinite(t).all()) for pair in server.state.total().values() for t in pair)


def test_of_two_replies_one_is_judged_by_earlier_rounds(tmp_path):
    _, records, _ = hostile(tmp_path, lambda f: with_factors(f, lambda b, a: (b * 1e3, a)), 2, 2, quorum=0.5)
    assert "times" in records[1]["clients"][1]["reason"] and records[1]["applied"]


def test_nobody_weighs_more_later_and_shares_have_a_limit(tmp_path):
    def change(found):
        return TrainReply("test", found.round, found.client, 10**12, factors=found.factors)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lied, records, _ = hostile(tmp_path / "a", change)
    honest, _, _ = hostile(tmp_path / "b", lambda f: f)
    assert records[1]["clients"][1]["rows"] == 20 and lied.state.sha256() == honest.state.sha256()
    assert capped([10, 20, 30], 1.0) == [1 / 6, 1 / 3, 1 / 2]
    assert capped([1, 1, 998], 0.5) == pytest.approx([0.25, 0.25, 0.5])
    assert capped([1, 98, 901], 0.4) == pytest.approx([0.2, 0.4, 0.4])
    assert capped([1, 2], 0.1) == [0.5, 0.5]


def test_clients_that_did_not_move_make_no_outlier_of_one_that_did():
    assert outliers([0.0, 0.0, 5.0], 10.0) == {} and outliers([1.0, 1.0, 50.0], 10.0).keys() == {2}
    assert outliers([5.0], 10.0) == {} and outliers([5.0], 10.0, 0.1).keys() == {0}


@pytest.mark.parametrize(
    ("text", "by", "what"),
    [
        (b"+1.00000000e+00", b"1" + b"0" * 14, "at most"),
        (b"+1.00000000e+00", b"1" * 15, "at most"),
    ],
)
def test_numbers_beyond_reason_are_refused(text, by, what):
    data = encode(reply(metrics={"x": 1.0}))
    assert text in data
    with pytest.raises(MessageError, match=what):
        decode_reply(data.replace(text, by), Manifest.of(MODULES, 2))
    with pytest.raises(MessageError, match="rows"):
        decode_reply(encode(reply(rows=10**400)), Manifest.of(MODULES, 2))


def test_an_error_text_is_one_line_for_a_terminal(tmp_path):
    evil = "\x1b[2J gone\nround 9/9: 3 clients " + "x" * 3000
    _, records, _ = hostile(tmp_path, lambda f: TrainReply("test", 2, f.client, error=evil))
    reason = records[1]["clients"][1]["reason"]
    assert reason.isprintable() and len(reason) <= 600 and "gone" in reason


class Dying(InlineEngine):
    """Dies after a number of replies."""

    left = 0

    def exchange(self, tasks, deadline, needed):
        for pair in super().exchange(tasks, deadline, needed):
            if type(self).left == 0:
                raise KeyboardInterrupt
            type(self).left -= 1
            yield pair


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": "flora"}, {"aggregation": {"type": "svd", "rank": 3}},
        {"aggregation": {"type": "svd", "rank": 3}, "server": {"type": "momentum"}},
        {"aggregation": "fedit", "ranks": 2, "scaffold": True, "optimizer": "sgd"},
        {"aggregation": "fedit", "ranks": 2, "server": {"type": "adam", "lr": 0.1}},
    ],
)  # fmt: skip
def test_an_interrupted_federation_ends_as_an_uninterrupted_one(tmp_path, after, changes):
    (tmp_path / "whole").mkdir()
    whole, records, _ = federate(tmp_path / "whole", **changes)
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "cut", engine=type("E", (Dying,), {"left": after}), **changes)
    again, more, port = federate(tmp_path / "cut", **changes)
    assert again.state.sha256() == whole.state.sha256()

    def plain(lines):
        timed = {"seconds": 0, "server_seconds": 0, "peak_rss_bytes": 0}
        return [{**r, **timed, "clients": [{**c, "seconds": 0} for c in r["clients"]]} for r in lines]

    assert plain(more) == plain(records)
    assert len(port.jobs) == 9 - after  # no reply is asked for twice


def test_scaffold_corrects_by_what_clients_did_beyond_the_others(tmp_path):
    """After one round c_i is the client's mean gradient and c their mean; the second round adds c - c_i."""
    _, _, port = federate(
        tmp_path, aggregation="fedit", ranks=2, rounds=2, scaffold=True, optimizer="sgd", local_steps=4, lr=0.05
    )
    first, second = port.jobs[:3], port.jobs[3:]
    assert all(not job.correction for job in first)
    for module in MODULES:
        moved = [
            [(s - e) / (4 * 0.05) for s, e in zip(job.start[module], end.factors[module], strict=True)]
            for job, end in ((job, Descent(port.targets, port.counts).train(job)) for job in first)
        ]
        for place in (0, 1):
            mean = torch.stack([m[place] for m in moved]).mean(dim=0)
            for job, mine in zip(second, moved, strict=True):
                assert torch.allclose(job.correction[module][place], mean - mine[place], atol=1e-4)


def test_momentum_goes_on_in_the_direction_of_the_last_rounds(tmp_path):
    ends = {}
    for kind in ("none", "momentum"):
        for rounds in (1, 2):
            folder = tmp_path / f"{kind}-{rounds}"
            folder.mkdir()
            server, _, _ = federate(
                folder, aggregation="flora", rounds=rounds, local_steps=2, server={"type": kind, "beta1": 0.5}
            )
            ends[kind, rounds] = server.state.total()
    for module in MODULES:
        first = dense(ends["none", 1], module)
        assert torch.allclose(dense(ends["momentum", 1], module), first, atol=1e-6)  # nothing to go on with yet
        plain = dense(ends["none", 2], module) - first
        second = dense(ends["momentum", 2], module) - first
        assert torch.allclose(second, plain + 0.5 * first, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rows": ()}, "rows and partition go together"),
        ({"ranks": [1, 2]}, "one for each of the 3 clients"),
        ({"clients": [{"id": "nobody"}]}, "none of the partition's"),
        ({"scaffold": True}, "use optimizer sgd and fedit or ffa"),
        ({"server": {"type": "adam"}}, "use momentum, or aggregation fedit or ffa"),
        ({"aggregation": "fedit"}, r"all ranks must be equal; they are \[1, 2, 3\]"),
        ({"aggregation": "flora", "start": "warm"}, "flora goes on reset"),
        ({"aggregation": "fedit", "ranks": 2, "start": "reset"}, "fedit goes on warm"),
        ({"partition": {"type": "iid", "n": 3, "alpha": 0.1}}, "about type dirichlet"),
        ({"clients": [{"id": "client-1", "joins": 3, "leaves": 2}]}, "leave later"),
        ({"clients": [{"id": "client-1", "rank": {2: 4}}]}, "begin with round 1"),
        ({"clients": [{"id": f"client-{k}", "joins": 2} for k in range(3)]}, "no client takes part in round 1"),
        ({"rows": (), "partition": None, "clients": [{"id": "..", "rows": "x"}]}, "clients.0.id"),
        ({"rows": (), "partition": None, "clients": [{"id": "con", "rows": "x"}], "ranks": 1}, "name of a device"),
        ({"rows": (), "partition": None, "ranks": 1, "clients": [{"id": i, "rows": "x"} for i in "Aa"]}, "given twice"),
        ({"ranks": True}, "a rank is a number"),
        ({"aggregation": "ffa"}, "all ranks must be equal"),
        (
            {"aggregation": "fedit", "ranks": 2, "scaffold": True, "optimizer": {"type": "sgd", "momentum": 0.9}},
            "momentum and weight decay",
        ),
        ({"aggregation": "fedex", "ranks": 2, "server": {"type": "momentum"}}, "use it with svd or flora"),
        ({"optimizer": "mezo", "proximal": 0.1}, "mezo has none"),
        ({"uplink": "scalars"}, "adamw has no scalars; use optimizer mezo"),
        ({"optimizer": "mezo", "max_grad_norm": 0.5}, "bounds its scalars"),
        ({"optimizer": {"type": "mezo", "perturb": "b"}, "aggregation": "rolora", "ranks": 2}, "use ffa, or all"),
        ({"optimizer": "mezo", "aggregation": "fedit", "ranks": 2, "scaffold": True}, "use optimizer sgd"),
        ({"privacy": {"mode": "flora-stack"}, "aggregation": "svd"}, "aggregation svd is of mode flora-svd"),
        ({"privacy": {"mode": "dense-sum"}}, "is not to be had here"),
        ({"privacy": {"mode": "seed-pool"}}, "adamw has no scalars; use optimizer mezo"),
        ({"privacy": {"mode": "secret"}}, "privacy.mode"),
        ({"privacy": {"secagg": True}}, "secure aggregation hides all but sums"),
        ({"privacy": {"dp": {"noise": 1.0, "clip": 1.0}}}, "no epsilon could be told"),
        ({"engine": "deployment"}, "rows stay with the SuperNodes"),
        ({"without": ["client-9"]}, "'client-9' is no client; did you mean"),
        ({"without": [f"client-{k}" for k in range(3)]}, "names every client"),
        (
            {
                "engine": "deployment",
                "rows": (),
                "partition": None,
                "clients": [{"id": "a"}],
                "ranks": 1,
                "withdraw": "x",
            },
            "withdraw them there",
        ),
        ({"superlink": {"address": "127.0.0.1:8000"}}, "about engine deployment"),
        ({"superlink": {"address": "far.example:8000"}}, "without root_certificates nothing is encrypted"),
        ({"superlink": {"address": "127.0.0.1.evil.example:8000"}}, "without root_certificates"),
        ({"parallel": 2}, "about engine simulation"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, what):
    with pytest.raises(ConfigError, match=what):
        settings(**changes)
    with pytest.raises(ConfigError, match="no clients"):
        validate(FederateConfig, {"model": "m"}, what="test")


def test_a_privacy_mode_means_a_rule_and_every_rule_has_one():
    given = {"model": "m", "rows": "x", "partition": {"type": "iid", "n": 3}}
    for mode, rules in MODES.items():
        config = validate(FederateConfig, {**given, "privacy": {"mode": mode}}, what="test")
        assert config.aggregation.type == rules[0] and exposure_of(config).mode == mode
    assert {rule for rules in MODES.values() for rule in rules} == {method.name for method in METHODS}
    assert mode_of("a plug-in's") == "flora-stack"  # the worst is assumed
    shown = exposure_of(validate(FederateConfig, {**given, "aggregation": "flora"}, what="test"))
    assert "one machine" in shown.server and "each client's A and B" in shown.clients


# through the door


def test_a_federation_through_the_door(tmp_path):
    config = {"rows": "lab:dev", "limit": 120, "partition": {"type": "domain", "n": 3}, "ranks": [4, 2, 2], "rounds": 2,
              "local_steps": 3, "lr": 5e-3, "batch_size": 16}  # fmt: skip
    path = tmp_path / "fed.yaml"
    path.write_text(json.dumps(config))
    report = honeloom.federate("lab:base", path, output_dir=tmp_path / "out", aggregation="flora")
    details = report.details
    assert all(check.passed for check in report.verification)
    assert details["rounds"] == 2 and len(details["global_sha256"]) == 64 and details["relative_error"] < 1e-6
    assert [c["status"] for c in details["clients"]] == [["ok", "ok"]] * 3
    assert [c["rank"] for c in details["clients"]] == [4, 2, 2]
    assert all(c["bytes_up"] > 0 and c["bytes_down"] > 0 for c in details["clients"])
    metrics = {m.name: m.value for m in report.metrics}
    assert metrics["client_loss_last"] < metrics["client_loss_first"]
    split = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert sum(c["rows"] for c in split["clients"]) == sum(c["rows"] for c in details["clients"])
    assert len((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / ".state").exists()
    assert details["privacy"]["mode"] == "flora-stack" and details["epsilon"] is None and details["uplink"] == "tensors"
    again = honeloom.federate("lab:base", path, output_dir=tmp_path / "again", aggregation="flora")
    assert again.details["global_sha256"] == details["global_sha256"]
    scored = honeloom.evaluate(tmp_path / "out", rows="lab:dev", limit=30)
    assert scored.metrics


@pytest.mark.parametrize(
    "at",
    [
        "report.json",
        "rounds.jsonl",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("manifest.json", "adapter_model")),
    ],
)
def test_an_interrupt_late_in_the_work_costs_none_of_it(tmp_path, at):
    """Whatever is being written after the last round, the same command goes on from there."""
    how = {"rows": "lab:dev", "limit": 40, "partition": {"type": "iid", "n": 2}, "ranks": 2, "rounds": 1,
           "local_steps": 1, "batch_size": 2}  # fmt: skip
    straight = honeloom.federate("lab:base", output_dir=tmp_path / "straight", **how)

    def interrupt(label):
        if at in label and not label.startswith("unlock"):
            raise KeyboardInterrupt

    atomic.observers[:] = [interrupt]
    try:
        with pytest.raises(KeyboardInterrupt):
            honeloom.federate("lab:base", output_dir=tmp_path / "out", **how)
    finally:
        atomic.observers.clear()
    report = honeloom.federate("lab:base", output_dir=tmp_path / "out", resume=True, **how)
    assert report.details["global_sha256"] == straight.details["global_sha256"]
    one, other = (tmp_path / n / "adapter_model.safetensors" for n in ("straight", "out"))
    assert one.read_bytes() == other.read_bytes() and all(check.passed for check in report.verification)
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_a_rank_beyond_the_model_is_refused_before_it_trains(tmp_path):
    with pytest.raises(ConfigError, match=r"client 'client-0': rank 2000 is over \d+"):
        honeloom.federate("lab:base", rows="lab:dev", limit=40, partition={"type": "iid", "n": 2}, ranks=[2000, 2],
                          output_dir=tmp_path / "out")  # fmt: skip


def test_the_plan_tells_who_sees_what_and_how_much_travels():
    plan = honeloom.plan("federate", model="lab:base", rows="lab:dev", partition={"type": "iid", "n": 2}, ranks=[8, 2])
    notes = "\n".join(next(stage for stage in plan if stage.verb == "federate").notes)
    assert "privacy flora-svd" in notes and "other clients see of it: the aggregate alone" in notes
    assert re.search(r"up 0\.\d+ MB to 0\.\d+ MB, down 0\.\d+ MB", notes)


def test_a_client_drops_tasks_of_rounds_before_its_last():
    port, clients = world(settings())
    clients["client-0"].memory.round = 5
    answer = clients["client-0"].handle(TrainTask("test", 4, "client-0", 3, 6.0, "fresh"))
    assert "a task of round 4 came after round 5; it is dropped" in answer.error and not port.jobs


def test_clients_with_rows_of_their_own(tmp_path):
    for k in range(2):
        lines = [{"id": f"{k}-{i}", "instruction": f"Say {k} and {i}.", "output": f"{k} {i}"} for i in range(12)]
        (tmp_path / f"site-{k}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clients = [{"id": f"site-{k}", "rows": str(tmp_path / f"site-{k}.jsonl")} for k in range(2)]
    report = honeloom.federate(
        "lab:base", clients=clients, ranks=2, rounds=1, local_steps=2, batch_size=4, output_dir=tmp_path / "out"
    )
    assert [(c["id"], c["rows"]) for c in report.details["clients"]] == [("site-0", 12), ("site-1", 12)]
