"""Federations of zeroth-order clients: scalars, sums over seeds, rates of their own, and what goes wrong with them."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import honeloom
from honeloom.backends.hf.federated_port import open_port
from honeloom.backends.hf.federated_steps import _private
from honeloom.config.base import validate
from honeloom.errors import ConfigError, HoneloomError
from honeloom.federated.client import ClientCore, fresh_factors
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.messages import Manifest, TrainReply, decode_reply, decode_task, digest_of, encode
from honeloom.federated.privacy import exposure_of
from honeloom.federated.rounds import InlineEngine, Silence, run_rounds
from honeloom.federated.scalars import Move, SeedPool, moved_along
from honeloom.federated.secure_sum import answered, masked
from honeloom.federated.server import ServerCore
from honeloom.federated.settling import read_measured, settle
from honeloom.federated.state import RoundRecord, ServerState
from honeloom.federated.store import RoundStore
from honeloom.testing.fakes import chat_row
from honeloom.tuning.config import MezoConfig
from honeloom.tuning.zeroth_order import ZerothOrder, step_seeds
from honeloom.types.federation import LocalResult

MODULES = {"layers.0.q": (120, 50), "layers.1.q": (40, 140)}
LR = 5e-4


class Hill:
    """A LocalPort whose loss is known: the squared distance of the whole update from a client's own target."""

    modules = MODULES

    def __init__(self, targets):
        self.targets, self.jobs, self.ends, self.scalars = targets, [], {}, {}

    def rows(self, client):
        return 10 * (1 + sorted(self.targets).index(client))

    def train(self, job):
        self.jobs.append(job)
        factors = {m: (b.clone(), a.clone()) for m, (b, a) in job.start.items()}

        def loss():
            gaps = (job.scale * b.double() @ a.double() - self.targets[job.client][m] for m, (b, a) in factors.items())
            return float(sum(gap.square().sum() for gap in gaps))

        mezo = MezoConfig(**job.settings["optimizer"])
        params = {
            f"{m}|{f}": pair[k]
            for m, pair in factors.items()
            for k, f in enumerate("ba")
            if job.trains in ("both", f) and (mezo.perturb == "all" or f == "b")
        }
        stepper, scalars, losses, before = ZerothOrder(params, mu=mezo.mu, kind=mezo.direction), [], [], loss()
        for seeds in job.directions:
            probes = stepper.step(loss, seeds, job.settings["lr"])
            scalars.append(tuple(p.scalar for p in probes))
            losses += [p.loss for p in probes]
        self.ends[job.order], self.scalars[job.order] = factors, scalars
        metrics = {"loss_before": before, "loss_train": sum(losses) / len(losses), "loss_after": loss()}
        return LocalResult(factors, metrics, tuple(scalars))


def settings(**changes):
    mezo = {"type": "mezo", "direction": "rademacher", **changes.pop("mezo", {})}
    given = {"model": "m", "rows": "x", "partition": {"type": "iid", "n": 3}, "ranks": 2, "rounds": 4,
             "local_steps": 6, "lr": LR, "optimizer": mezo, "uplink": "scalars", "aggregation": "ffa",
             **changes}  # fmt: skip
    return validate(FederateConfig, given, what="test")


def world(config):
    generator = torch.Generator().manual_seed(1)
    names = [client.id for client in config.members()]
    port = Hill({n: {m: torch.randn(s, generator=generator).double() for m, s in MODULES.items()} for n in names})
    return port, {name: ClientCore(name, port) for name in names}


def federate(folder, config=None, engine=None, **changes):
    folder.mkdir(exist_ok=True)
    config = config or settings(**changes)
    port, clients = world(config)
    store = RoundStore(folder)
    server, carrier = ServerCore(config, "test", MODULES, store.load()), (engine or InlineEngine)(clients)
    run_rounds(server, carrier, store)
    return server, store.records(), port, carrier


class Seen(InlineEngine):
    """Keeps the tasks that went down, and lets `away` name clients that hear nothing in a round."""

    away = {}

    def __init__(self, clients):
        super().__init__(clients)
        self.tasks = []

    def exchange(self, tasks, deadline, needed):
        number = decode_task(next(iter(tasks.values()))).round
        gone = [name for name in tasks if number in self.away.get(name, ())]
        self.tasks += [decode_task(data) for name, data in tasks.items() if name not in gone]
        yield from ((name, Silence("away")) for name in gone)
        yield from super().exchange({n: d for n, d in tasks.items() if n not in gone}, deadline, needed)


UPLINKS = [
    {"uplink": "scalars", "aggregation": "ffa"}, {"uplink": "scalars", "aggregation": "fedit"},
    {"uplink": "scalars", "aggregation": "rolora"},
    {"uplink": "scalars", "aggregation": "fedit", "mezo": {"directions": 3}},
    {"uplink": "seed-pool", "pool_size": 64}, {"uplink": "seed-pool", "pool_size": 64, "aggregation": "fedit"},
]  # fmt: skip


@pytest.mark.parametrize("changes", UPLINKS)
def test_no_factor_travels_and_all_hold_what_the_server_has(tmp_path, changes):
    _, records, _, carrier = federate(tmp_path / "out", engine=Seen, **changes)
    assert all(c["status"] == "ok" for r in records for c in r["clients"])
    assert not any(task.shared or task.frozen for task in carrier.tasks)
    if changes["uplink"] == "scalars":
        for client in carrier.clients.values():  # each holds what the last round began with
            assert client.memory.version == 3
        last = carrier.tasks[-1]
        assert last.digest == digest_of(next(iter(carrier.clients.values())).memory.shared)
    rule, (first, last) = changes.get("aggregation", "ffa"), (records[0]["clients"], records[-1]["clients"])
    if rule == "ffa":
        assert sum(c["loss_before"] for c in last) < sum(c["loss_before"] for c in first)
    errors = [r["error"] for r in records]
    assert max(errors) > 1e-3 if rule == "fedit" else max(errors) < 1e-6


@pytest.mark.parametrize("changes", UPLINKS)
def test_scalars_and_tensors_lead_to_one_state_and_sums_to_nearly_the_same(tmp_path, changes):
    """The mean of the clients' own ends is what the server has: of scalars to the last bit, of sums to rounding."""
    found, *_ = federate(tmp_path / "small", rounds=1, **changes)
    plain, *_ = federate(tmp_path / "tensors", rounds=1, **{**changes, "uplink": "tensors", "pool_size": 1024})
    one, other = found.state.total(), plain.state.total()
    if changes["uplink"] == "scalars":
        assert all(torch.equal(x, y) for m in MODULES for x, y in zip(one[m], other[m], strict=True))
    else:  # other directions: compare with the ends of the clients themselves
        server, _, port, _ = federate(tmp_path / "ends", rounds=1, **changes)
        shares = {name: port.rows(name) / 60 for name in port.targets}
        for module in MODULES:
            for place in range(2):
                mean = sum(shares[n] * port.ends[f"{n}/1"][module][place].double() for n in shares)
                mine = server.state.total()[module][place] / (2.0 if place == 0 else 1.0)
                assert torch.allclose(mine.double(), mean, atol=1e-6)


@pytest.mark.parametrize("changes", UPLINKS)
def test_a_client_that_was_away_for_three_rounds_rejoins_by_replay(tmp_path, changes):
    engine = type("E", (Seen,), {"away": {"client-1": (2, 3, 4)}})
    _, records, port, carrier = federate(tmp_path / "out", engine=engine, rounds=5, quorum=0.5, **changes)
    statuses = [next(c for c in r["clients"] if c["id"] == "client-1")["status"] for r in records]
    assert statuses == ["ok", "absent", "absent", "absent", "ok"]
    back = next(t for t in carrier.tasks if t.client == "client-1" and t.round == 5)
    others = next(t for t in carrier.tasks if t.client == "client-0" and t.round == 5)
    assert not back.shared and back.digest == others.digest
    starts = {job.client: job.start for job in port.jobs if job.order.endswith("/5")}
    for name in starts:
        assert digest_of(starts[name]) == digest_of(starts["client-0"])


def test_a_client_that_is_not_asked_for_three_rounds_is_sent_these_three(tmp_path):
    """Of a quarter asked in every round, whoever comes back holds an older version than the one before."""
    _, records, _, carrier = federate(
        tmp_path / "out", engine=Seen, rounds=12, participation=0.3, partition={"type": "iid", "n": 4}
    )
    assert all(c["status"] == "ok" for r in records for c in r["clients"])
    gaps = [task.version - task.since for task in carrier.tasks if task.since]
    assert max(gaps) >= 3
    assert all(len(task.log) == task.version - task.since for task in carrier.tasks if task.log)


def test_whoever_ends_elsewhere_is_sent_the_factors_themselves(tmp_path):
    class Tampered(Seen):
        def exchange(self, tasks, deadline, needed):
            if decode_task(next(iter(tasks.values()))).round == 3:
                memory = self.clients["client-2"].memory
                if memory.shared:
                    memory.shared = {m: (b + 1e-3, a) for m, (b, a) in memory.shared.items()}
            yield from super().exchange(tasks, deadline, needed)

    found, records, _, _ = federate(tmp_path / "tampered", engine=Tampered)
    assert all(c["status"] == "ok" for r in records for c in r["clients"])
    assert found.state.sha256() == federate(tmp_path / "plain")[0].state.sha256()


def test_a_state_with_a_long_log_is_read_back_and_a_log_has_limits(tmp_path):
    store, state = RoundStore(tmp_path), ServerState()
    for number in range(1, 41):
        who = tuple((f"client-{k}", 0.05, LR) for k in range(20))
        scalars = np.random.default_rng(number).normal(size=(20, 500, 4)).astype(np.float32)
        state.log.add(Move(number, who, scalars), most_bytes=1 << 40)
    state.round = 1
    store.save(state, RoundRecord(1, []))
    again = store.load().log
    assert sum(move.scalars.nbytes for move in again.entries) > 4 << 20  # more than a header may hold
    assert (again.first, again.version, len(again.entries)) == (9, 40, 32) and again.after(7) is None
    for one, other in zip(again.entries, state.log.entries, strict=True):
        assert (one.round, one.clients) == (other.round, other.clients) and np.array_equal(one.scalars, other.scalars)


def test_a_log_is_forgotten_once_the_factors_are_smaller(tmp_path):
    """A client that joins late is then sent the factors."""
    clients = [{"id": "client-2", "joins": 26}]
    server, records, _, carrier = federate(tmp_path / "out", engine=Seen, rounds=26, clients=clients)
    late = next(t for t in carrier.tasks if t.client == "client-2")
    assert server.state.log.first > 1 and late.since == 0 and late.shared and not late.log
    assert records[-1]["clients"][2]["status"] == "ok"


class Dying(InlineEngine):
    left = 0

    def exchange(self, tasks, deadline, needed):
        for pair in super().exchange(tasks, deadline, needed):
            if type(self).left == 0:
                raise KeyboardInterrupt
            type(self).left -= 1
            yield pair


class Anew(InlineEngine):
    """As Flower: a new run's clients hold nothing."""

    def restore(self, state):
        state.held.clear()


@pytest.mark.parametrize("engine", [InlineEngine, Anew])
@pytest.mark.parametrize("after", [0, 2, 3, 4, 8])
@pytest.mark.parametrize("changes", [*UPLINKS[:2], UPLINKS[4], {"rates": {"statistic": "loss"}, "lr": 2 * LR}])
def test_an_interrupted_federation_ends_as_an_uninterrupted_one(tmp_path, engine, after, changes):
    whole, records, *_ = federate(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "cut", engine=type("E", (Dying,), {"left": after}), **changes)
    again, more, *_ = federate(tmp_path / "cut", engine=engine, **changes)
    assert again.state.sha256() == whole.state.sha256()
    assert [[c["lr"] for c in r["clients"]] for r in more] == [[c["lr"] for c in r["clients"]] for r in records]


def test_messages_of_a_pool_have_one_size_and_those_of_scalars_are_small(tmp_path):
    sizes = {}
    for steps in (5, 50):
        _, records, *_ = federate(tmp_path / f"pool-{steps}", uplink="seed-pool", pool_size=256, local_steps=steps)
        sizes[steps] = {c[key] for r in records[1:] for c in r["clients"] for key in ("bytes_up", "bytes_down")}
    assert len(sizes[5] | sizes[50]) <= 4 and max(sizes[50]) < 8 * 256 + 900
    _, records, *_ = federate(tmp_path / "scalars", local_steps=30)
    assert max(c["bytes_up"] for r in records for c in r["clients"]) < 4 * 30 + 420


def test_a_pool_that_all_steps_draw_from_and_its_sums():
    pool = SeedPool(32, 5)
    picks = pool.picks("c/1", 400, 2)
    assert picks.shape == (400, 2) and set(np.unique(picks)) == set(range(32)) and len(set(pool.seeds())) == 32
    assert (picks != pool.picks("c/2", 400, 2)).any()
    scalars = np.arange(800, dtype=np.float32).reshape(400, 2)
    sums = pool.sums("c/1", scalars, 0.5)
    assert sums.sum() == pytest.approx(-0.25 * scalars.sum())
    begun, mezo = fresh_factors(MODULES, 2, 0, "shared"), MezoConfig(direction="rademacher")
    at_once = moved_along(begun, sums, pool=pool, mezo=mezo, trains="b")
    step_by_step = {m: (b.clone(), a.clone()) for m, (b, a) in begun.items()}
    stepper, seeds = (
        ZerothOrder({f"{m}|b": pair[0] for m, pair in step_by_step.items()}, kind="rademacher"),
        pool.seeds(),
    )
    for mine, numbers in zip(picks.tolist(), scalars.tolist(), strict=True):
        stepper.replay([(seeds[j], g) for j, g in zip(mine, numbers, strict=True)], 0.5)
    for module in MODULES:
        assert torch.allclose(at_once[module][0], step_by_step[module][0], rtol=1e-4, atol=0.2)
        assert torch.equal(at_once[module][1], begun[module][1])


# rates of single clients


@pytest.mark.parametrize("statistic", ["loss", "difference", "random"])
@pytest.mark.parametrize("uplink", ["scalars", "tensors", "seed-pool"])
def test_rates_follow_from_the_round_before_at_no_further_bytes(tmp_path, statistic, uplink):
    plain = federate(tmp_path / "plain", uplink=uplink)[1]
    _, records, port, _ = federate(tmp_path / "own", uplink=uplink, rates={"statistic": statistic, "spread": 0.2})
    assert [c["lr"] for c in records[1]["clients"]] == [job.settings["lr"] for job in port.jobs[3:6]]
    if statistic != "random":
        assert {c["lr"] for c in records[0]["clients"]} == {LR}
        rates = [c["lr"] for c in records[1]["clients"]]
        assert max(abs(lr / LR - 1) for lr in rates) == pytest.approx(0.2) and len(set(rates)) == 3
    assert all(0.8 - 1e-9 <= c["lr"] / LR <= 1.2 + 1e-9 for r in records for c in r["clients"])
    up = [[c["bytes_up"] for c in r["clients"]] for r in plain]
    assert [[c["bytes_up"] for c in r["clients"]] for r in records] == up


def test_the_difference_is_the_published_sum_of_norms(tmp_path):
    _, records, port, _ = federate(tmp_path / "out", rates={"statistic": "difference"}, aggregation="fedit", rounds=2)
    names = sorted(port.targets)
    start = port.jobs[0].start
    ways = {
        n: {m: [e - s for e, s in zip(port.ends[f"{n}/1"][m], start[m], strict=True)] for m in MODULES} for n in names
    }
    apart = {}
    for n in names:
        apart[n] = sum(
            float((ways[n][m][k] - torch.stack([ways[o][m][k] for o in names]).mean(dim=0)).norm())
            for m in MODULES
            for k in range(2)
        )
    mean = sum(apart.values()) / 3
    most = max(abs(q - mean) for q in apart.values())
    wanted = [LR + 0.5 * LR * (apart[n] - mean) / most for n in names]
    assert [c["lr"] for c in records[1]["clients"]] == pytest.approx(wanted, rel=1e-4)


def test_five_rounds_must_have_been_and_whoever_is_away_is_half_forgotten(tmp_path):
    engine = type("E", (Seen,), {"away": {"client-0": (7,)}})
    _, records, *_ = federate(tmp_path / "out", engine=engine, rounds=8, rates={"statistic": "five_rounds"})
    by_round = [{c["id"]: c["lr"] for c in r["clients"]} for r in records]
    assert all(lr == LR for rates in by_round[:5] for lr in rates.values())
    assert by_round[5]["client-1"] != LR
    # in round 7 it was away, so that in round 8 half of the deviation that it had there is left
    assert by_round[7]["client-0"] - LR == pytest.approx((by_round[6]["client-0"] - LR) / 2)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rates": {"spread": 0.2}}, "give a statistic"),
        (
            {"rates": {"statistic": "difference"}, "aggregation": "svd"},
            "and svd has none",
        ),
        ({"rates": {"statistic": "random", "robust": True}}, "random does not"),
        ({"rates": {"statistic": "loss", "least": 2.0, "most": 1.0}}, "least 2 is over most 1"),
        ({"rates": {"statistic": "loss", "spread": 1.5}}, "spread"),
        ({"uplink": "seed-pool", "aggregation": "svd"}, "use ffa, which trains B alone"),
        ({"uplink": "seed-pool", "server": {"type": "adam"}}, "a seed-pool has sums"),
        ({"pool_size": 64}, "about uplink seed-pool"),
        ({"method": "full"}, "use uplink seed-pool"),
        ({"method": "full", "uplink": "seed-pool", "ranks": 4}, "ranks is about adapters"),
        ({"method": "full", "uplink": "seed-pool", "ranks": 8, "load_in": "4bit"}, "float32 weights"),
        ({"uplink": "seed-pool", "optimizer": "adamw"}, "adamw has no scalars"),
        ({"privacy": {"mode": "seed-pool"}}, "ffa is of mode average; use uplink seed-pool"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, what):
    with pytest.raises(ConfigError, match=what):
        settings(**changes)


def test_the_mode_of_a_pool_means_its_uplink():
    given = {"model": "m", "rows": "x", "partition": {"type": "iid", "n": 3}, "optimizer": "mezo"}
    config = validate(FederateConfig, {**given, "privacy": {"mode": "seed-pool"}}, what="test")
    assert config.uplink == "seed-pool" and config.aggregation.type == "ffa"


# rates that clients measure


class Measuring(Hill):
    """Tells a rate by client."""

    rates, times = {"client-0": 1e-4, "client-1": 4e-4, "client-2": 0.4}, 2

    def measure(self, job):
        assert job.settings["horizon"] == 24 and job.start and not job.frozen
        rate = self.rates[job.client]
        return {
            "trace": 1 / rate,
            "largest": 0.1 / rate,
            "signal": 0.5,
            "bound": min(self.times * rate, 1.0),
            "rate": rate,
            "mu": 3e-3,
        }


def measuring(tmp_path, config, **rates):
    port = type("P", (Measuring,), {"rates": {**Measuring.rates, **rates}})(world(config)[0].targets)
    engine = InlineEngine({name: ClientCore(name, port) for name in port.targets})
    return settle(config, "test", engine, tmp_path), port


def test_the_median_of_what_clients_measure_is_the_rate_of_all(tmp_path):
    config = settings(lr="auto", mezo={"mu": "auto"})
    found, _ = measuring(tmp_path, config)
    assert found.lr == 4e-4 and found.optimizer.mu == 3e-3 and not found.measures
    assert read_measured(tmp_path)["clients"]["client-2"]["rate"] == 0.4
    again, _ = measuring(tmp_path, config, **{"client-1": 5e-4})  # an attempt that goes on does not measure again
    assert again.lr == 4e-4
    assert settle(settings(), "test", None, tmp_path) == settings()


@pytest.mark.parametrize(("times", "wanted"), [(2, 1.0), (6, 2.0), (100, 3.0)])
def test_the_mean_of_clients_bears_more_than_one_of_them(tmp_path, times, wanted):
    """As many times as there are clients, within a third of what they bear without noise."""
    port = type("P", (Measuring,), {"times": times})(world(settings())[0].targets)
    engine = InlineEngine({name: ClientCore(name, port) for name in port.targets})
    assert settle(settings(lr="auto"), "test", engine, tmp_path).lr == pytest.approx(wanted * 4e-4)


def test_a_client_that_cannot_measure_costs_itself_alone_and_too_few_end_it(tmp_path):
    found, _ = measuring(tmp_path, settings(lr="auto"), **{"client-1": -1.0})
    assert found.lr == 1e-4 and set(read_measured(tmp_path)["clients"]) == {"client-0", "client-2"}
    (tmp_path / "few").mkdir()
    with pytest.raises(HoneloomError, match=r"lr auto: 1 of 3 clients measured .*client-1: reply"):
        measuring(tmp_path / "few", settings(lr="auto"), **{"client-1": -1.0, "client-2": 9.0})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_measured_rate_through_the_door(tmp_path, method):
    how = {"rows": "lab:dev", "partition": {"type": "iid", "n": 2}, "rounds": 2, "local_steps": 10, "batch_size": 4,
           "max_length": 48, "uplink": "seed-pool", "pool_size": 64, "method": method, "dtype": "fp32", "lr": "auto",
           "optimizer": {"type": "mezo", "direction": "rademacher"}}  # fmt: skip
    report = honeloom.federate("lab:base", output_dir=tmp_path / "out", **how)
    told = report.details["measured"]
    assert report.details["clients"][0]["lr"] == [told["lr"]] * 2 and len(told["clients"]) == 2
    assert told["lr"] == pytest.approx(max(told["rate"], min(2 * told["rate"], told["bound"] / 3)))
    assert 0 < told["rate"] < told["bound"] and told["rate"] == min(c["rate"] for c in told["clients"].values())
    assert json.loads((tmp_path / "out" / "curvature.json").read_text()) == told
    again = honeloom.federate("lab:base", output_dir=tmp_path / "again", **how)
    assert again.details["global_sha256"] == report.details["global_sha256"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lr": "auto", "optimizer": "adamw", "uplink": "tensors"}, "use optimizer mezo, or give lr as a number"),
        ({"lr": "auto", "mezo": {"objective": "accuracy"}}, "steps on the loss"),
        ({"lr": "auto", "privacy": {"dp": {"clip": 1.0, "noise": 1.0}}}, "give lr and mu as numbers"),
        ({"lr": "atuo"}, "did you mean 'auto'"),
        ({"lr": -1.0}, "must be over 0, or auto"),
    ],
)
def test_rates_that_cannot_be_measured_are_refused(changes, what):
    with pytest.raises(ConfigError, match=what):
        settings(**changes)


# secure sums


SECURE = {"uplink": "seed-pool", "pool_size": 64, "privacy": {"secagg": True}, "partition": {"type": "iid", "n": 4}}


class Losing(InlineEngine):
    """Loses `client-1` in one phase of round 2, before or after its answer."""

    phase, deaf = "train", False

    def exchange(self, tasks, deadline, needed):
        first = decode_task(next(iter(tasks.values())))
        for name, data in tasks.items():
            if first.round == 2 and name == "client-1" and first.phase == self.phase:
                if not self.deaf:
                    self.clients[name].handle(decode_task(data))
                yield name, Silence("gone")
            else:
                yield name, encode(self.clients[name].handle(decode_task(data)))


def test_a_secure_sum_leads_where_the_plain_one_does(tmp_path):
    plain, *_ = federate(tmp_path / "plain", **{**SECURE, "privacy": {}})
    secure, records, *_ = federate(tmp_path / "secure", **SECURE)
    assert np.abs(secure.state.pool - plain.state.pool).max() < 1e-7 < np.abs(plain.state.pool).max()
    assert all(c["status"] == "ok" and c["norm"] is None for r in records for c in r["clients"])
    assert sum(c["share"] for c in records[0]["clients"]) == pytest.approx(1.0)
    assert records[0]["error"] is None and records[0]["applied"]


@pytest.mark.parametrize("phase", ["keys", "shares", "train", "reveal"])
@pytest.mark.parametrize("deaf", [True, False])
def test_a_client_that_is_lost_in_any_phase_costs_itself_alone(tmp_path, phase, deaf):
    engine = type("E", (Losing,), {"phase": phase, "deaf": deaf})
    secure, records, port, _ = federate(tmp_path / "secure", engine=engine, rounds=2, quorum=0.5, **SECURE)
    assert records[1]["applied"]
    in_sum = ["client-0", "client-2", "client-3"] + (["client-1"] if phase == "reveal" else [])
    first, *_ = federate(tmp_path / "first", rounds=1, quorum=0.5, **SECURE)
    pool, moves = SeedPool(64, 0), np.zeros(64)
    rows = sum(port.rows(name) for name in in_sum)
    for name in in_sum:
        scalars = np.array(port.scalars[f"{name}/2"], dtype=np.float32)
        moves += port.rows(name) / rows * pool.sums(f"{name}/2", scalars, LR)
    assert np.abs(secure.state.pool - first.state.pool - moves).max() < 1e-7
    lost = next(c for c in records[1]["clients"] if c["id"] == "client-1")
    assert lost["status"] == ("ok" if phase == "reveal" else "absent") and "gone" in lost["reason"]


def test_below_the_threshold_a_round_is_given_up_and_changes_nothing(tmp_path):
    class Few(InlineEngine):
        def exchange(self, tasks, deadline, needed):
            first = decode_task(next(iter(tasks.values())))
            for name, data in tasks.items():
                if first.round == 2 and first.phase == "reveal" and name != "client-0":
                    yield name, Silence("gone")
                else:
                    yield name, encode(self.clients[name].handle(decode_task(data)))

    one, *_ = federate(tmp_path / "one", rounds=1, **SECURE)
    server, records, *_ = federate(tmp_path / "out", engine=Few, rounds=2, **SECURE)
    assert not records[1]["applied"] and "nothing of the sum can be opened" in records[1]["reason"]
    assert np.array_equal(server.state.pool, one.state.pool)


def test_a_server_that_lies_about_survivors_learns_nothing(tmp_path):
    """It asks for what opens a client's mask although it has that client's vector: the others do not answer."""

    class Liar(InlineEngine):
        def exchange(self, tasks, deadline, needed):
            for name, data in tasks.items():
                task = decode_task(data)
                if task.phase == "reveal":
                    client = self.clients[name]
                    client.handle(task)  # the true list was answered
                    fewer = {**task.notes, "survivors": [n for n in task.notes["survivors"] if n != "client-3"]}
                    data = encode(replace(task, notes=fewer))
                yield name, encode(self.clients[name].handle(decode_task(data)))

    _, records, *_ = federate(tmp_path / "out", engine=Liar, rounds=1, **SECURE)
    assert not records[0]["applied"]
    reasons = [c["reason"] or "" for c in records[0]["clients"]]
    assert sum("not the list that was answered before" in reason for reason in reasons) >= 3


@pytest.mark.parametrize("after", [1, 5, 9, 14, 20])
def test_a_secure_round_that_is_cut_is_done_anew(tmp_path, after):
    whole, *_ = federate(tmp_path / "whole", **SECURE)
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "cut", engine=type("E", (Dying,), {"left": after}), **SECURE)
    again, _, port, _ = federate(tmp_path / "cut", **SECURE)
    if after == 14:  # its sum may have been opened: the same steps must not be summed again
        assert again.state.sha256() != whole.state.sha256()
        assert {job.order for job in port.jobs[:4]} == {f"client-{k}/1/1" for k in range(4)}
    else:
        assert again.state.sha256() == whole.state.sha256()


def test_a_client_takes_part_in_a_sum_once():
    """A server that begins a round anew, after it was opened, and leaves somebody out would see that one's part."""
    _, clients = world(settings(**SECURE))
    server = ServerCore(settings(**SECURE), "test", MODULES)
    tasks = server.begin()
    while tasks:
        for name, data in tasks.items():
            assert server.ingest(name, clients[name].reply_to(data)) == "ok"
        tasks = server.proceed()
    assert server.finish().applied
    again = ServerCore(settings(**SECURE), "test", MODULES)
    told = decode_reply(clients["client-0"].reply_to(again.begin()["client-0"]), Manifest.of_notes(9999))
    assert "its part in this sum was given" in told.error
    other = ServerCore(settings(**SECURE), "test", MODULES)  # another attempt sums other steps
    told = decode_reply(clients["client-0"].reply_to(other.begin(opened=1)["client-0"]), Manifest.of_notes(9999))
    assert told.error is None


@pytest.mark.parametrize("fault", ["stranger", "key", "huge"])
def test_one_hostile_client_costs_itself_or_the_round_and_never_the_server(tmp_path, fault):
    class Hostile(InlineEngine):
        def exchange(self, tasks, deadline, needed):
            first = decode_task(next(iter(tasks.values())))
            for name, data in tasks.items():
                reply = self.clients[name].reply_to(data)
                if name == "client-3" and fault == "key" and first.phase == "keys":
                    told = decode_reply(reply, Manifest.of_notes(9999))
                    reply = encode(replace(told, notes={**told.notes, "masking": "00" * 32}))
                if name == "client-3" and fault == "huge" and first.phase == "train":
                    told = decode_reply(reply, Manifest.of_arrays(masked=("I64", 64)))
                    reply = encode(replace(told, arrays={"masked": told.arrays["masked"] + (1 << 62)}))
                if name == "client-3" and fault == "stranger" and first.phase == "keys":
                    reply = encode(TrainReply("test", first.round, name, error="no"))
                yield name, reply
            if fault == "stranger" and first.phase in ("shares", "train"):  # it was not asked, and answers
                yield "client-3", encode(TrainReply("test", first.round, "client-3", 5, notes={"phase": "shares"}))

    server, records, *_ = federate(tmp_path / "out", engine=Hostile, rounds=1, quorum=0.5, **SECURE)
    (record,) = records
    assert record["applied"] == (fault != "huge")
    if fault == "huge":
        assert "a client spoilt it" in record["reason"] and server.state.pool is None
    else:
        assert [c["status"] for c in record["clients"]] == ["ok", "ok", "ok", "rejected"]


def test_in_a_secure_sum_of_weights_who_began_elsewhere_is_left_out():
    config = settings(**SECURE, method="full", ranks=8)
    server = ServerCore(config, "test", {"w": (10, 1)})
    kept, tasks = {}, server.begin()
    while tasks:
        for name, data in tasks.items():
            task = decode_task(data)
            if task.phase == "train":
                kept[name], hidden = masked(kept[name], task, np.full(64, LR * (9 if name == "client-3" else 1)))
                digest = ("b" if name == "client-3" else "a") * 16
                answer = TrainReply("test", 1, name, 5, digest=digest, arrays={"masked": hidden})
            else:
                kept[name], said = answered(kept.get(name, {}), task)
                answer = TrainReply("test", 1, name, 5, notes=said)
            assert server.ingest(name, encode(answer)) == "ok"
        tasks = server.proceed()
    record = server.finish()
    assert record.applied and [c.status for c in record.clients] == ["ok", "ok", "ok", "rejected"]
    assert np.allclose(server.state.pool, LR, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"privacy": {"secagg": True}}, "use uplink seed-pool"),
        ({**SECURE, "partition": {"type": "iid", "n": 2}}, "round 1 asks 2 of 2 clients, and a sum takes 3"),
        ({**SECURE, "participation": 0.5}, "round 1 asks 2 of 4 clients"),
        ({**SECURE, "clients": [{"id": f"client-{k}", "leaves": 2} for k in (1, 2)]}, "round 2 asks 2 of 2"),
        ({**SECURE, "outlier": 5.0}, "secagg hides them"),
        ({"rates": {"statistic": "loss"}, "rounds": 1}, "all have one rate"),
        ({"rates": {"statistic": "five_rounds"}, "rounds": 5}, "differ after five rounds"),
        ({"mezo": {"perturb": "b"}}, "ffa trains B alone by itself"),
        ({"method": "full", "uplink": "seed-pool", "ranks": 8, "dtype": "bf16"}, "use dtype fp32"),
        ({**SECURE, "rates": {"statistic": "difference"}}, "secagg hides them"),
        ({"privacy": {"dp": {"clip": 1.0, "noise": 1.0}}, "mezo": {"clip": 1.0}}, "a clip of its own"),
        ({"privacy": {"dp": {"clip": 1.0, "noise": 1.0}}, "mezo": {"objective": "accuracy"}}, "use objective loss"),
        ({"privacy": {"dp": {"clip": 1.0, "noise": 1.0}}, "rates": {"statistic": "loss"}}, "use difference"),
        ({"privacy": {"dp": {"clip": 1.0, "noise": -1.0}}}, "privacy.dp.noise"),
        ({"privacy": {"dp": {"clip": 1.0, "noise": 1.0, "delta": 1.0}}}, "privacy.dp.delta"),
        (
            {"engine": "deployment", "rows": (), "partition": None, "clients": [{"id": "a"}],
             "privacy": {"dp": {"clip": 1.0, "noise": 1.0, "seed": 1}}},
            "is for simulations",
        ),
    ],
)  # fmt: skip
def test_privacy_that_cannot_be_is_refused(changes, what):
    with pytest.raises(ConfigError, match=what):
        settings(**changes)


def test_a_rate_that_is_not_given_suits_the_steps_and_what_is_measured_is_told():
    for changes, lr in (({}, 1e-4), ({"method": "full", "uplink": "seed-pool", "ranks": 8}, 1e-6)):
        assert settings(**{**changes, "lr": None}).lr_in(1) == lr
    adamw = {"optimizer": {"type": "adamw"}, "uplink": "tensors"}
    assert settings(lr=None, **adamw).lr_in(1) == 2e-4
    assert "the curvature of its loss" in exposure_of(settings(lr="auto")).server
    assert "curvature" not in exposure_of(settings()).server


# through the door


def test_clients_tune_by_forward_passes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("there is no backward pass"))
    how = {"rows": "lab:dev", "partition": {"type": "domain", "n": 2}, "ranks": 4, "rounds": 2, "local_steps": 20,
           "batch_size": 4, "max_length": 48, "lr": 5e-4, "aggregation": "ffa"}  # fmt: skip
    hashes = set()
    for setting in ("memory", "speed"):
        mezo = {"type": "mezo", "direction": "rademacher", "setting": setting}
        report = honeloom.federate("lab:base", optimizer=mezo, output_dir=tmp_path / setting, **how)
        metrics = {m.name: m.value for m in report.metrics}
        assert metrics["client_loss_last"] < metrics["client_loss_first"] - 0.02
        assert report.details["relative_error"] < 1e-6
        hashes.add(report.details["global_sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": "svd"},
        pytest.param({"aggregation": "flora"}, marks=pytest.mark.slow),
        pytest.param({"aggregation": "rolora", "ranks": 2}, marks=pytest.mark.slow),
        pytest.param({"aggregation": "fedit", "ranks": 2, "perturb": "b"}, marks=pytest.mark.slow),
        {"aggregation": "svd", "directions": 2, "clip": 0.5},
    ],
)
def test_scalars_say_what_tensors_say(tmp_path, changes):
    """The server has the very factors, whatever the rule makes of them; a message is some hundred bytes."""
    mezo = {"type": "mezo", "direction": "rademacher", **{k: v for k, v in changes.items() if k in MEZO}}
    how = {"rows": "lab:dev", "limit": 60, "partition": {"type": "iid", "n": 2}, "ranks": [4, 2], "rounds": 2,
           "local_steps": 6, "batch_size": 2, "max_length": 32, "lr": 2e-4, "optimizer": mezo,
           **{k: v for k, v in changes.items() if k not in MEZO}}  # fmt: skip
    found = {}
    for uplink in ("tensors", "scalars"):
        report = honeloom.federate("lab:base", uplink=uplink, output_dir=tmp_path / uplink, **how)
        assert [c["status"] for c in report.details["clients"]] == [["ok", "ok"]] * 2
        found[uplink] = (report.details["global_sha256"], [c["bytes_up"] / 2 for c in report.details["clients"]])
    assert found["tensors"][0] == found["scalars"][0]
    assert max(found["scalars"][1]) < 500 < 50 * 500 < min(found["tensors"][1])


MEZO = ("perturb", "directions", "clip")


def scalar_reply(scalars, digest="0" * 16, **changes):
    arrays = {"scalars": torch.tensor(scalars, dtype=torch.float32)}
    return TrainReply(
        **{"experiment": "test", "round": 1, "client": "client-0", "rows": 5, "arrays": arrays, "digest": digest}
        | changes
    )


@pytest.mark.parametrize(
    ("reply_of", "what"),
    [
        (lambda: scalar_reply([0.5, 0.25]), "do not lead to the factors"),
        (lambda: scalar_reply([0.5]), "scalars of 1 numbers of type F32, expected 2 of F32"),
        (lambda: scalar_reply([0.5, math.nan]), "scalars hold NaN"),
        (lambda: scalar_reply([]), "scalars of 0 numbers"),
        (lambda: scalar_reply([0.5, 0.25], arrays={"scalars": torch.ones(2).double()}), "type F64, expected 2 of F32"),
        (lambda: scalar_reply([0.5, 0.25], arrays={"pool": torch.ones(2)}), "array 'pool' was not agreed"),
        (lambda: scalar_reply([0.5, 0.25], arrays={}), "no scalars"),
        (lambda: scalar_reply([0.5, 0.25], notes={"more": 1}), "notes were not agreed"),
        (
            lambda: scalar_reply([0.5, 0.25], factors={"layers.0.q": (torch.ones(6, 2), torch.ones(2, 5))}),
            "was not agreed",
        ),
    ],
)
def test_forged_scalars_are_refused(reply_of, what):
    config = settings(local_steps=2, ranks=[3, 2, 1], aggregation="svd", mezo={"direction": "gaussian"})
    server = ServerCore(config, "test", MODULES)
    server.begin()
    assert server.ingest("client-0", encode(reply_of())) == "rejected"
    assert re.search(what, server._record.clients[0].reason)


def test_scalars_lead_the_server_where_the_client_went_and_a_replay_of_them_nowhere():
    mezo = {"directions": 2, "direction": "gaussian"}
    config = settings(local_steps=3, lr=1e-3, ranks=[3, 2, 1], aggregation="svd", mezo=mezo)
    server = ServerCore(config, "test", MODULES)
    server.begin()
    begun = fresh_factors(MODULES, 3, 0, "shared")
    params = {f"{m}|{f}": t for m, pair in begun.items() for f, t in zip("ba", pair, strict=True)}
    stepper, scalars = ZerothOrder(params, mu=1e-3), []
    for step in range(3):
        seeds = step_seeds(0, "client-0/1", step, 2)
        loss = lambda: float(sum((t.double() - 0.3).square().sum() for t in params.values()))  # noqa: E731
        scalars.append([p.scalar for p in stepper.step(loss, seeds, 1e-3)])
    sent = encode(scalar_reply(np.ravel(scalars), digest_of(begun)))
    assert server.ingest("client-0", sent) == "ok" and len(sent) < 400
    mine = server._replies["client-0"].factors
    assert all(torch.equal(x, y) for m in MODULES for x, y in zip(mine[m], begun[m], strict=True))
    server.finish()
    server.begin()
    assert server.ingest("client-0", sent) == "late"  # of round 1


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_pool_through_the_door(tmp_path, method):
    how = {"rows": "lab:dev", "partition": {"type": "domain", "n": 2}, "rounds": 2, "local_steps": 20, "batch_size": 4,
           "max_length": 48, "uplink": "seed-pool", "pool_size": 128, "method": method, "dtype": "fp32",
           "lr": 5e-4 if method == "lora" else 2e-5,
           "optimizer": {"type": "mezo", "direction": "rademacher", "setting": "speed"}}  # fmt: skip
    report = honeloom.federate("lab:base", output_dir=tmp_path / "out", **how)
    assert all(check.passed for check in report.verification) and report.details["method"] == method
    metrics = {m.name: m.value for m in report.metrics}
    assert metrics["client_loss_last"] < metrics["client_loss_first"]
    assert all(c["bytes_up"] < 2 * 1000 for c in report.details["clients"])
    assert report.artefact.kind == ("model" if method == "full" else "adapter")
    again = honeloom.federate("lab:base", output_dir=tmp_path / "again", **how)
    assert again.details["global_sha256"] == report.details["global_sha256"]
    if method == "full":
        pool = json.loads((tmp_path / "out" / "pool.json").read_text())
        assert len(pool["seeds"]) == len(pool["sums"]) == 128 and any(pool["sums"])
        assert not any("lora" in p.name for p in (tmp_path / "out").iterdir())


def test_clients_without_adapters_must_begin_with_the_same_weights():
    config = settings(method="full", uplink="seed-pool", ranks=8, pool_size=16)
    server = ServerCore(config, "test", {"w": (10, 1)})
    server.begin()
    for name, digest in (("client-0", "a" * 16), ("client-1", "a" * 16), ("client-2", "b" * 16)):
        answer = TrainReply("test", 1, name, 5, digest=digest, arrays={"pool": torch.ones(16)})
        assert server.ingest(name, encode(answer)) == "ok"
    record = server.finish()
    assert [c.status for c in record.clients] == ["ok", "ok", "rejected"] and record.applied
    assert "began with other weights" in record.clients[2].reason
    assert server.state.pool.tolist() == [1.0] * 16 and record.clients[0].norm == pytest.approx(math.sqrt(160))


DP = {"clip": 5.0, "noise": 1.0, "delta": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("uplink", ["scalars", "seed-pool"])
def test_noise_on_scalars_through_the_door(tmp_path, uplink):
    how = {"rows": "lab:dev", "partition": {"type": "iid", "n": 3}, "rounds": 2, "local_steps": 4, "batch_size": 8,
           "max_length": 48, "uplink": uplink, "aggregation": "ffa", "lr": 1e-5,
           "optimizer": {"type": "mezo", "direction": "rademacher"}}  # fmt: skip
    report = honeloom.federate("lab:base", output_dir=tmp_path / "a", privacy={"dp": {**DP, "seed": 1}}, **how)
    details = report.details
    assert all(check.passed for check in report.verification)
    from honeloom.federated.dp import epsilon  # the library's accountant, called apart

    rows = [c["rows"] for c in details["clients"]]
    wanted = [epsilon(1.0, 8 / n, 8, 1e-3, rows=n) for n in rows]
    assert [c["epsilon"] for c in details["clients"]] == wanted and details["epsilon"] == max(wanted)
    lines = [json.loads(line) for line in (tmp_path / "a" / "rounds.jsonl").read_text().splitlines()]
    assert all(c[k] is None for r in lines for c in r["clients"] for k in ("loss_before", "loss_train", "loss_after"))
    hashes = {details["global_sha256"]}
    for name, seed in (("b", 1), ("c", 2), ("d", None), ("e", None)):
        again = honeloom.federate("lab:base", output_dir=tmp_path / name, privacy={"dp": {**DP, "seed": seed}}, **how)
        hashes.add(again.details["global_sha256"])
    assert len(hashes) == 4  # the second run of seed 1 is the first; no two runs without a seed are alike


def test_a_noised_reply_is_given_once_and_again_the_same():
    """Noise that is drawn again for the same task could be averaged out."""
    config = settings(privacy={"dp": DP})
    server = ServerCore(config, "test", MODULES)
    port, clients = world(config)
    task, draws = server.begin()["client-0"], np.random.default_rng(0)
    port.train = lambda job: LocalResult(job.start, {}, tuple((float(draws.normal()),) for _ in job.directions))
    first = clients["client-0"].reply_to(task)
    assert clients["client-0"].reply_to(task) == first and decode_task(task).settings["dp"]["noise"] == 1.0
    plain = settings()
    again = ServerCore(plain, "test", MODULES).begin()["client-0"]
    assert clients["client-0"].reply_to(again) != clients["client-0"].reply_to(again)  # what is not noised is not kept


def test_a_row_changes_no_other_rows_scalar(tiny_model):
    """In one batch with them it would, in the last bits, which a small mu makes large."""
    rows = [chat_row(f"r{k}", "Say it.", "word " * n) for k, n in enumerate((3, 5, 4, 30))]
    port = open_port(
        tiny_model, {"method": "lora", "targets": "all-linear", "batch_size": 2, "max_length": 64, "load_in": None,
                     "dtype": "bf16", "device": "cpu"}, {}, name="tiny",
    )  # fmt: skip
    seen = []
    for mine in (rows[:3], rows):
        port.admit("c", mine)
        job = SimpleNamespace(client="c", order="c/1", seed=0, directions=((1,),),
                              settings={"batch_size": len(mine), "dp": {"seed": 1}})  # fmt: skip
        (objective,) = _private(port.model, port.held, job, None)
        seen.append(objective())
    assert len(seen[1]) == 4 and np.array_equal(seen[0], seen[1][:3])


def test_noise_whose_accounting_does_not_hold_is_refused(tmp_path):
    how = {"rows": "lab:dev", "limit": 60, "partition": {"type": "iid", "n": 3}, "optimizer": "mezo", "rounds": 1}
    for changes, what in (
        ({"batch_size": 30}, "client 'client-0', which has 20 rows: batch_size 30 is more than there are"),
        ({"batch_size": 4, "privacy": {"dp": {**DP, "delta": 0.2}}}, "client 'client-0', which has 20 rows: delta 0.2"),
    ):
        with pytest.raises(ConfigError, match=what):
            honeloom.federate("lab:base", output_dir=tmp_path / "out", **{"privacy": {"dp": DP}, **how, **changes})
    assert not (tmp_path / "out").exists()
