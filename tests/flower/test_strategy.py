"""Flower's strategy: exact sums, refused replies, PEFT clients with and without helpers, and the shipped example."""

import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from honeloom.backends.flower.records import PREFIX, read_factors, write_factors
from honeloom.errors import ConfigError, HoneloomError, MessageError
from honeloom.federated import METHODS
from honeloom.federated.config import SvdConfig
from honeloom.federated.federate_config import EQUAL_RANKS
from honeloom.flower import FloraStrategy, hold, receive, reply

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"layers.0.q": (6, 5), "layers.1.v": (4, 7)}


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """What Flower sets in the process of a ServerApp."""
    for name, value in (("_task_id", 1), ("_run_id", 1), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)
    torch.set_num_threads(1)


def factors(seed, rank, size=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (size * torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))
        for name, (m, n) in SHAPES.items()
    }


def answer(node, arrays, metrics, kind="train"):
    asked = Message(RecordDict(), dst_node_id=node, message_type=kind)
    content = {"arrays": arrays} if arrays is not None else {}
    return Message(RecordDict({**content, "metrics": MetricRecord(metrics)}), reply_to=asked)


def sent(node, pairs, rows=10, scale=1.0, **metrics):
    given = {"num-examples": rows, "partition-id": node % 1000, **metrics}
    if scale is not None:
        given["lora-scale"] = scale
    return answer(node, write_factors(pairs), given)


def products(pairs):
    return {name: b.double() @ a.double() for name, (b, a) in pairs.items()}


def gap(one, other):
    """Largest relative difference over the modules."""
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def expected(clients):
    """Sum of p_k s_k B_k A_k, densely."""
    total = sum(rows for _, rows, _ in clients)
    return {n: sum(r / total * s * products(p)[n] for p, r, s in clients) for n in SHAPES}


CLIENTS = [(factors(1, 4), 30, 2.0), (factors(2, 2), 50, 1.0), (factors(3, 1), 20, 16 / math.sqrt(2))]


def replies_of(clients=CLIENTS):
    return [sent(k + 1, pairs, rows, scale) for k, (pairs, rows, scale) in enumerate(clients)]


# ------------------------------------------------------------------------------------------------- aggregation


def test_a_stack_is_the_weighted_sum_for_mixed_ranks_and_scales():
    strategy = FloraStrategy("flora")
    arrays, metrics = strategy.aggregate_train(1, replies_of())
    assert gap(products(read_factors(arrays)), expected(CLIENTS)) < 1e-6
    assert gap(products(strategy.update()), expected(CLIENTS)) < 1e-6
    assert metrics["relative-error"] < 1e-6
    assert metrics["refused"] == 0
    assert metrics["bytes-up"] == sum(write_factors(p).count_bytes() for p, _, _ in CLIENTS)


def test_flowers_own_average_is_not_the_sum():
    same = [(factors(k, 4), 10, 1.0) for k in (1, 2)]
    replies = replies_of(same)
    naive, _ = FedAvg().aggregate_train(1, replies)
    exact, _ = FloraStrategy("flora").aggregate_train(1, replies)
    assert gap(products(read_factors(naive)), expected(same)) > 0.5
    assert gap(products(read_factors(exact)), expected(same)) < 1e-6


@pytest.mark.parametrize("rule", ["flora", "svd", "flexlora"])
def test_another_factorisation_of_a_clients_update_changes_nothing(rule):
    turned = []
    for k, (pairs, rows, scale) in enumerate(CLIENTS):
        rank = next(iter(pairs.values()))[0].shape[1]
        q = torch.randn(rank, rank, generator=torch.Generator().manual_seed(k)) + 3 * torch.eye(rank)
        turned.append(({n: (b @ q, torch.linalg.solve(q, a)) for n, (b, a) in pairs.items()}, rows, scale))
    one, _ = FloraStrategy(rule).aggregate_train(1, replies_of())
    other, _ = FloraStrategy(rule).aggregate_train(1, replies_of(turned))
    assert gap(products(read_factors(one)), products(read_factors(other))) < 1e-5


@pytest.mark.parametrize("rule", ["flora", "svd", "zero_pad"])
def test_the_order_of_replies_changes_no_byte(rule):
    runs = [FloraStrategy(rule), FloraStrategy(rule)]
    arrays = [run.aggregate_train(1, replies_of()[:: 1 - 2 * k])[0] for k, run in enumerate(runs)]
    assert arrays[0] == arrays[1]
    assert list(arrays[0]) == list(arrays[1])
    assert runs[0].records[0].sha256 == runs[1].records[0].sha256


def test_clients_are_sorted_by_their_own_numbers_not_by_node_ids():
    first = [sent(k + 1, p, r, s) for k, (p, r, s) in enumerate(CLIENTS)]
    again = [sent((7 - k) * 1000 + k + 1, p, r, s) for k, (p, r, s) in enumerate(CLIENTS)]
    assert FloraStrategy("flora").aggregate_train(1, first)[0] == FloraStrategy("flora").aggregate_train(1, again)[0]


def test_svd_keeps_the_largest_rank_and_measures_what_it_cuts():
    strategy = FloraStrategy({"type": "svd", "rank": 3})
    arrays, metrics = strategy.aggregate_train(1, replies_of())
    wanted, got = expected(CLIENTS), products(read_factors(arrays))
    tails = [float(torch.linalg.svdvals(w)[3:].square().sum()) for w in wanted.values()]
    whole = sum(float(w.square().sum()) for w in wanted.values())
    assert metrics["rank"] == 3
    assert metrics["relative-error"] == pytest.approx(math.sqrt(sum(tails) / whole), rel=1e-5)
    assert all(np.linalg.matrix_rank(g.numpy()) == 3 for g in got.values())
    assert FloraStrategy().aggregate_train(1, replies_of())[1]["rank"] == 4
    assert FloraStrategy(SvdConfig(rank=2)).aggregate_train(1, replies_of())[1]["rank"] == 2


def test_metrics_of_clients_are_averaged_if_all_have_them():
    replies = [sent(1, factors(1, 2), 10, loss=1.0, odd=3), sent(2, factors(2, 2), 30, loss=2.0, list=[1.0, 2.0])]
    _, metrics = FloraStrategy("flora").aggregate_train(1, replies)
    assert metrics["loss"] == pytest.approx(1.75)
    assert set(metrics) == {"loss", "rank", "refused", "bytes-up", "bytes-down", "relative-error"}


# ------------------------------------------------------------------------------------------------------ faults


def spoiled(change):
    arrays = write_factors(CLIENTS[1][0])
    change(arrays)
    return answer(9, arrays, {"num-examples": 50, "lora-scale": 1.0, "partition-id": 9})


def put(arrays, name, values, **claims):
    array = Array(np.asarray(values))
    for key, value in claims.items():
        setattr(array, key, value)
    arrays[PREFIX + name] = array


HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (6, 9999999999), }".ljust(117)
    + b"\n"
)
BAD = {
    "NaN": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_A.weight", np.full((2, 5), np.nan, "f4"))), "NaN"),
    "infinite": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_A.weight", np.full((2, 5), 1e300))), "infinity"),
    "shape": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_A.weight", np.ones((2, 4), "f4"))), "shape"),
    "no product": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_A.weight", np.ones((3, 5), "f4"))), "no product"),
    "one factor": (lambda: spoiled(lambda r: r.pop(PREFIX + "layers.0.q.lora_A.weight")), "one factor"),
    "a module less": (lambda: sent(9, {"layers.0.q": CLIENTS[1][0]["layers.0.q"]}), "layers.1.v"),
    "a module more": (lambda: sent(9, {**CLIENTS[1][0], "x": CLIENTS[1][0]["layers.0.q"]}), "'x'"),
    "DoRA": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_magnitude_vector", np.ones(6, "f4"))), "DoRA"),
    "bias": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_B.bias", np.ones(6, "f4"))), "bias"),
    "embedding": (lambda: spoiled(lambda r: put(r, "e.lora_embedding_A", np.ones((2, 5), "f4"))), "embedding"),
    "modules_to_save": (lambda: spoiled(lambda r: put(r, "head.weight", np.ones((2, 5), "f4"))), "modules_to_save"),
    "integers": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_A.weight", np.ones((2, 5), "i4"))), "int32"),
    "short": (
        lambda: spoiled(lambda r: put(r, "layers.0.q.lora_A.weight", np.ones((2, 4), "f4"), shape=(2, 5))), "(2, 4)"
    ),
    "lying": (
        lambda: spoiled(
            lambda r: put(r, "layers.0.q.lora_B.weight", np.ones((6, 2), "f4"), data=HUGE, shape=(6, 9999999999))
        ),
        "no product",
    ),
    "lying header": (
        lambda: spoiled(lambda r: put(r, "layers.0.q.lora_B.weight", np.ones((6, 2), "f4"), data=HUGE)), "9999999999"
    ),
    "no NPY": (lambda: spoiled(lambda r: put(r, "layers.0.q.lora_B.weight", np.ones((6, 2), "f4"), data=b"x")), "NPY"),
    "rank": (lambda: sent(9, factors(9, 65)), "rank 65"),
    "no rows": (lambda: sent(9, CLIENTS[1][0], 0), "num-examples"),
    "NaN rows": (lambda: sent(9, CLIENTS[1][0], float("nan")), "num-examples"),
    "listed rows": (lambda: sent(9, CLIENTS[1][0], [1.0]), "num-examples"),
    "no scale": (lambda: sent(9, CLIENTS[1][0], scale=None), "honeloom.flower.reply"),
    "zero scale": (lambda: sent(9, CLIENTS[1][0], scale=0.0), "lora-scale"),
    "no arrays": (lambda: answer(9, None, {"num-examples": 1}), "one of each"),
    "nothing": (lambda: answer(9, ArrayRecord(), {"num-examples": 1, "lora-scale": 1.0}), "no factors"),
    "an error": (
        lambda: Message(Error(0, "out of memory"), reply_to=Message(RecordDict(), dst_node_id=9, message_type="train")),
        "out of memory",
    ),
    "huge": (lambda: sent(9, factors(9, 2, 1e6)), "norm"),
}  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_refused_and_the_others_are_exact(kind, known):
    make, reason = BAD[kind]
    strategy = FloraStrategy("flora", max_rank=64)
    if known:
        grid = Grid({})
        zeros = write_factors({n: (torch.zeros(m, 2), torch.ones(2, k)) for n, (m, k) in SHAPES.items()})
        strategy.fraction_train, strategy.min_train_nodes, strategy.min_available_nodes = 1.0, 0, 0
        strategy.configure_train(1, zeros, ConfigRecord(), grid)
    arrays, metrics = strategy.aggregate_train(1, [make(), *replies_of()])
    assert gap(products(read_factors(arrays)), expected(CLIENTS)) < 1e-6
    assert metrics["refused"] == 1
    odd = [client for client in strategy.records[0].clients if client.status == "rejected"]
    assert len(odd) == 1
    assert reason in odd[0].reason
    assert odd[0].id == "9"


def test_below_the_quorum_nothing_changes():
    strategy = FloraStrategy("flora", quorum=0.7)
    bad = [BAD["NaN"][0](), BAD["an error"][0]()]
    arrays, metrics = strategy.aggregate_train(1, [*replies_of(), *bad])
    assert arrays is None
    assert metrics["refused"] == 2
    assert "relative-error" not in metrics
    assert not strategy.update()
    assert strategy.aggregate_train(2, replies_of())[0] is not None
    assert strategy.aggregate_train(3, [])[0] is None
    with pytest.raises(HoneloomError, match="no update to save"):
        FloraStrategy().save("nowhere")


def test_two_clients_with_different_modules_are_both_refused_unless_the_modules_are_known():
    other = {"strange": factors(5, 2)["layers.0.q"]}
    strategy = FloraStrategy("flora")
    assert strategy.aggregate_train(1, [sent(1, factors(1, 2)), sent(2, other)])[0] is None
    assert "initial_arrays" in strategy.records[0].clients[0].reason


def test_rules_that_average_factors_refuse_the_odd_rank():
    replies = [sent(k, factors(k, rank)) for k, rank in enumerate([2, 2, 3], start=1)]
    strategy = FloraStrategy("fedit")
    assert strategy.aggregate_train(1, replies)[1]["refused"] == 1
    assert "rank is 3" in strategy.records[0].clients[2].reason


def test_evaluation_goes_on_without_metrics_of_some():
    good = [answer(k, None, {"num-examples": 10 * k, "loss": float(k)}, "evaluate") for k in (1, 2)]
    bad = [answer(3, None, {"loss": 1.0}, "evaluate"), BAD["an error"][0]()]
    assert FloraStrategy().aggregate_evaluate(1, [*bad, *good])["loss"] == pytest.approx(5 / 3)
    assert FloraStrategy().aggregate_evaluate(1, bad) is None


def test_clients_that_say_nothing_count_against_the_quorum():
    strategy = FloraStrategy("flora", quorum=0.6, min_available_nodes=5, min_train_nodes=5)
    grid = Grid(dict.fromkeys(range(1, 7)))
    asked = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord({"lr": 0.1}), grid))
    assert {m.metadata.dst_node_id for m in asked} == set(grid.nodes)
    assert asked[0].content["config"]["lr"] == 0.1
    assert strategy.aggregate_train(1, replies_of())[0] is None
    assert [client.status for client in strategy.records[0].clients] == ["ok"] * 3 + ["absent"] * 3
    assert strategy.aggregate_train(2, replies_of())[0] is not None


def test_what_fedavg_takes_is_passed_on():
    strategy = FloraStrategy(fraction_train=0.5, min_train_nodes=1, min_available_nodes=4, weighted_by_key="tokens")
    config = ConfigRecord()
    asked = list(strategy.configure_train(3, ArrayRecord(), config, Grid(dict.fromkeys(range(4)))))
    assert len(asked) == 2
    assert not config
    assert asked[0].content["config"]["server-round"] == 3
    strategy.aggregate_train(3, [sent(1, factors(1, 2), 5, tokens=10), sent(2, factors(2, 2), 5, tokens=30)])
    assert gap(products(strategy.update()), expected([(factors(1, 2), 10, 1.0), (factors(2, 2), 30, 1.0)])) > 0.1
    wanted = {n: 0.25 * products(factors(1, 2))[n] + 0.75 * products(factors(2, 2))[n] for n in SHAPES}
    best = {n: torch.linalg.svd(w) for n, w in wanted.items()}
    best = {n: u[:, :2] * s[:2] @ v[:2] for n, (u, s, v) in best.items()}
    assert gap(products(strategy.update()), best) < 1e-5


def test_without_flower_the_extra_is_named():
    code = "import sys; sys.modules['flwr'] = None; import honeloom.flower"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingExtraError: flwr is not installed" in done.stderr
    assert "honeloom[federated]" in done.stderr


def test_settings_that_cannot_be_are_refused():
    for rule in ("nonsense", {"type": "svd", "rnk": 3}):
        with pytest.raises(ConfigError, match="rule"):
            FloraStrategy(rule)
    for wrong in ({"scale": 0.0}, {"scale": float("inf")}, {"quorum": 0.0}, {"outlier": 1.0}):
        with pytest.raises(ConfigError):
            FloraStrategy(**wrong)
    with pytest.raises(ConfigError, match="scale"):
        FloraStrategy().configure_train(1, write_factors(factors(1, 2)), ConfigRecord(), Grid({}))
    with pytest.raises(ConfigError, match="initial_arrays"):
        FloraStrategy().configure_train(1, ArrayRecord([np.ones(3)]), ConfigRecord(), Grid({}))


# ----------------------------------------------------------------------------------------------- real PEFT models


class Grid:
    """Flower's grid in this process: node -> what answers its messages."""

    def __init__(self, nodes):
        self.nodes, self.messages = nodes, []

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, timeout=None):
        found = []
        for message in messages:
            self.messages.append(message)
            try:
                found.append(self.nodes[message.metadata.dst_node_id](message))
            except Exception as error:
                found.append(Message(Error(0, repr(error)), reply_to=message))
        return found


TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12) % 17 + 3


def peft_model(folder, rank, alpha, seed=0, **more):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, task_type="CAUSAL_LM", **more)
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def with_update(folder, update):
    """Logits of the base whose weights have the update added, without PEFT."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, (b, a) in update.items():
        model.get_submodule(name).weight.data += (b.double() @ a.double()).float()
    return logits(model)


def steps(model, seed, count=3, lr=0.01):
    """Some steps on rows of the client's own."""
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(seed))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    model.eval()
    for _ in range(count):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def context(number):
    return Context(run_id=1, node_id=number, node_config={"partition-id": number}, state=RecordDict(), run_config={})


def helped(folder, number, rank, alpha, keep=True, **more):
    """A client with the helpers; its model stays, or is made anew for every message."""
    held = [peft_model(folder, rank, alpha, number, **more)]
    seen = []

    def handle(message):
        model = held[0] if keep else peft_model(folder, rank, alpha, 77, **more)
        receive(model, message, context(number))
        seen.append(logits(model))
        kind = message.metadata.message_type
        loss = steps(model, number) if kind == "train" else 1.0
        return reply(model, message, context(number), rows=10 * number, metrics={"loss": loss})

    handle.seen = seen
    return handle


def run(strategy, nodes, rounds=2, arrays=None):
    grid = Grid(nodes)
    result = strategy.start(grid, arrays, num_rounds=rounds)
    return result, grid


@pytest.mark.parametrize("rule", [method.name for method in METHODS])
def test_every_rule_runs_with_the_helpers_and_says_how_exact_it_was(rule, tiny_model):
    ranks = (4, 4, 4) if rule in EQUAL_RANKS else (4, 2, 1)
    nodes = {100 + k: helped(tiny_model, k, r, 2 * r + k) for k, r in enumerate(ranks, start=1)}
    strategy = FloraStrategy(rule, min_available_nodes=3, fraction_evaluate=0.0)
    result, _ = run(strategy, nodes, rounds=3)
    assert [client.reason for record in strategy.records for client in record.clients] == [None] * 9
    errors = [metrics["relative-error"] for metrics in result.train_metrics_clientapp.values()]
    if rule in ("flora", "fedex", "ffa", "rolora"):
        assert max(errors) < 1e-5
    else:
        assert 1e-5 < max(errors) < 3
    losses = [metrics["loss"] for metrics in result.train_metrics_clientapp.values()]
    assert losses[-1] < losses[0]
    assert gap(products(strategy.update()), products(read_factors(result.arrays))) < 1e-6


def test_the_default_begins_warm_and_holds_the_whole_update_at_every_rank(tiny_model):
    nodes = {k: helped(tiny_model, k, r, 2 * r) for k, r in enumerate((4, 2, 1), start=1)}
    strategy = FloraStrategy(min_available_nodes=3, fraction_evaluate=1.0)
    result, _ = run(strategy, nodes, rounds=2)
    first = FloraStrategy(min_available_nodes=3, fraction_evaluate=0.0)
    run(first, {k: helped(tiny_model, k, r, 2 * r) for k, r in enumerate((4, 2, 1), start=1)}, rounds=1)
    after_one, after_two = with_update(tiny_model, first.update()), with_update(tiny_model, strategy.update())
    for handle in nodes.values():  # trained, evaluated, trained, evaluated
        assert float((handle.seen[1] - after_one).abs().max()) < 1e-5
        assert float((handle.seen[2] - after_one).abs().max()) < 1e-5
        assert float((handle.seen[3] - after_two).abs().max()) < 1e-5
    assert float((after_two - after_one).abs().max()) > 1e-3
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(1.0)


def test_an_untrained_reply_is_the_update_that_was_sent(tiny_model):
    strategy = FloraStrategy("svd", scale=1.0, min_available_nodes=1, min_train_nodes=1, fraction_evaluate=0.0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    some = {n: (torch.randn(m.weight.shape[0], 6) / 9, torch.randn(6, m.weight.shape[1]) / 9)
            for n, m in base.named_modules() if n.endswith(tuple(TARGETS))}  # fmt: skip
    model = peft_model(tiny_model, 3, 5)

    def handle(message):
        receive(model, message)
        assert float((logits(model) - with_update(tiny_model, some)).abs().max()) < 1e-5
        return reply(model, message, rows=1)

    run(strategy, {1: handle}, rounds=1, arrays=write_factors(some))
    assert strategy.records[0].clients[0].reason is None
    # svd keeps as many columns as the largest client has: of the client's rank and what it held beside, all 6
    assert gap(products(strategy.update()), products(some)) < 1e-5
    assert strategy.records[0].clients[0].norm == pytest.approx(0.0, abs=1e-5)


def test_a_client_without_memory_gives_the_same_bytes(tiny_model):
    runs = []
    for keep in (True, False):
        nodes = {k: helped(tiny_model, k, r, 2 * r, keep) for k, r in enumerate((3, 2), start=1)}
        runs.append(run(FloraStrategy("flora", fraction_evaluate=0.0), nodes, rounds=3)[0].arrays)
    assert runs[0] == runs[1]


def test_a_clients_rank_may_change_between_rounds(tiny_model):
    ranks = {1: iter((4, 2, 6)), 2: iter((1, 5, 3))}

    def changing(number):
        def handle(message):
            model = peft_model(tiny_model, rank := next(ranks[number]), rank, number)
            receive(model, message, context(number))
            steps(model, number)
            return reply(model, message, context(number), rows=5)

        return handle

    strategy = FloraStrategy("svd", fraction_evaluate=0.0)
    run(strategy, {k: changing(k) for k in ranks}, rounds=3)
    assert [[c.rank for c in r.clients if c.status == "ok"] for r in strategy.records] == [[4, 1], [2, 5], [6, 3]]


def plain(folder, number, rank, alpha, train=True, load=True):
    """An ordinary Flower client with PEFT, that knows nothing of honeloom."""

    def handle(message):
        model = peft_model(folder, rank, alpha, number)
        if load:
            missing = set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
            assert not missing.unexpected_keys
        handle.seen = logits(model)
        if train:
            steps(model, number)
        arrays = ArrayRecord(get_peft_model_state_dict(model))
        return Message(
            RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": number})}), reply_to=message
        )

    return handle


@pytest.mark.parametrize("given", [True, False])
def test_plain_peft_clients_need_no_helper_if_the_scale_is_given(given, tiny_model):
    initial = ArrayRecord(get_peft_model_state_dict(peft_model(tiny_model, 4, 8))) if given else None
    strategy = FloraStrategy(scale=2.0, fraction_evaluate=0.0)
    nodes = {k: plain(tiny_model, k, 4, 8) for k in (1, 2)}
    result, _ = run(strategy, nodes, rounds=2, arrays=initial)
    assert [client.reason for record in strategy.records for client in record.clients] == [None] * 4
    still = {k: plain(tiny_model, k, 4, 8, train=False) for k in (1, 2)}
    again, _ = run(FloraStrategy(scale=2.0, fraction_evaluate=0.0), still, rounds=1, arrays=result.arrays)
    for handle in still.values():
        assert float((handle.seen - with_update(tiny_model, strategy.update())).abs().max()) < 1e-5
    assert gap(products(read_factors(again.arrays)), products(read_factors(result.arrays))) < 1e-5


def test_plain_clients_are_refused_where_something_is_frozen_or_fixed(tiny_model):
    strategy = FloraStrategy("flora", scale=2.0, fraction_evaluate=0.0)
    with_helpers = {k: helped(tiny_model, k, 4, 8) for k in (2, 3)}
    run(strategy, {1: plain(tiny_model, 1, 4, 8, load=False), **with_helpers}, rounds=2)
    assert [c.status for c in strategy.records[0].clients] == ["ok"] * 3
    assert ["frozen" in (c.reason or "") for c in strategy.records[1].clients] == [False, False, True]
    strategy = FloraStrategy("ffa", scale=2.0, fraction_evaluate=0.0)
    run(strategy, {1: plain(tiny_model, 1, 4, 8), **with_helpers}, rounds=1)
    assert sum("its A of" in (c.reason or "") for c in strategy.records[0].clients) == 1


def test_the_saved_adapter_loads_in_peft_with_the_same_logits(tiny_model, tmp_path):
    nodes = {k: helped(tiny_model, k, r, 3 * r) for k, r in enumerate((4, 2, 1), start=1)}
    strategy = FloraStrategy("flora", fraction_evaluate=0.0)
    result, _ = run(strategy, nodes, rounds=2)
    folder = strategy.save(tmp_path / "adapter", base_model=str(tiny_model))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    wanted = with_update(tiny_model, strategy.update())
    assert float((logits(PeftModel.from_pretrained(base, folder)) - wanted).abs().max()) < 1e-5
    model = peft_model(tiny_model, 2, 2)
    hold(model, result.arrays)
    assert float((logits(model) - wanted).abs().max()) < 1e-5
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)


def test_rank_and_alpha_patterns_and_rslora_are_folded(tiny_model):
    more = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True}
    nodes = {1: helped(tiny_model, 1, 3, 4, **more), 2: helped(tiny_model, 2, 2, 4)}
    strategy = FloraStrategy("flora", fraction_evaluate=0.0)
    run(strategy, nodes, rounds=2)
    assert [client.reason for record in strategy.records for client in record.clients] == [None] * 4
    model = peft_model(tiny_model, 3, 4, **more)
    hold(model, write_factors(strategy.update()))
    assert float((logits(model) - with_update(tiny_model, strategy.update())).abs().max()) < 1e-5


def test_a_narrow_base_takes_part_in_float32(tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    config = LoraConfig(r=3, lora_alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    narrow = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())

    def handle(message):
        receive(narrow, message, context(1))
        assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.float32}
        steps(narrow, 1)
        return reply(narrow, message, context(1), rows=5)

    strategy = FloraStrategy("flora", fraction_evaluate=0.0)
    run(strategy, {1: handle, 2: helped(tiny_model, 2, 2, 4)}, rounds=2)
    assert [client.reason for record in strategy.records for client in record.clients] == [None] * 4


def test_rolora_trains_b_and_a_in_turns(tiny_model):
    trained = []

    def watched(number):
        handle = helped(tiny_model, number, 3, 5 + number)

        def answered(message):
            trained.append(message.content["config"]["lora-trains"])
            return handle(message)

        return answered

    strategy = FloraStrategy("rolora", fraction_evaluate=0.0)
    run(strategy, {k: watched(k) for k in (1, 2)}, rounds=3)
    assert trained == ["b", "b", "a", "a", "b", "b"]
    assert max(record.error for record in strategy.records) < 1e-5


def test_adapters_that_are_more_than_lora_are_refused_at_the_client(tiny_model):
    message = next(iter(FloraStrategy(min_train_nodes=1, min_available_nodes=1).configure_train(
        1, ArrayRecord(), ConfigRecord(), Grid({5: None}))))  # fmt: skip
    for more, reason in (
        ({"use_dora": True}, "DoRA"), ({"bias": "all"}, "bias"), ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            receive(peft_model(tiny_model, 2, 2, **more), message)
    with pytest.raises(MessageError, match="FloraStrategy"):
        receive(peft_model(tiny_model, 2, 2), Message(RecordDict(), dst_node_id=1, message_type="train"))
    with pytest.raises(ConfigError, match="one adapter"):
        receive(AutoModelForCausalLM.from_pretrained(tiny_model), message)
    other = FloraStrategy(scale=1.0, min_train_nodes=1, min_available_nodes=1)
    asked = next(iter(other.configure_train(1, write_factors(factors(1, 2)), ConfigRecord(), Grid({5: None}))))
    with pytest.raises(MessageError, match=r"layers\.0\.q"):
        receive(peft_model(tiny_model, 2, 2), asked)


# ---------------------------------------------------------------------------------------------- the shipped example


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(port, process, seconds=90):
    """Until something listens there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "flower-superlink ended"
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    pytest.fail(f"nothing listens on port {port}")


@pytest.fixture
def simulated(tmp_path):
    """A SuperLink on this machine that simulates its nodes; all of its processes end with the test."""
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    tools = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{tools}:/usr/bin:/bin", "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    with open(tmp_path / "superlink.log", "wb") as log:
        process = subprocess.Popen(
            [tools / "flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation",
             "--host", "127.0.0.1", "--port", str(port)],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(port, process)
            yield environment, tools / "flwr"
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sign)  # its own session: no other process is in the group
                    process.wait(20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


@pytest.mark.flower
def test_the_example_runs_in_flowers_simulation_and_its_adapter_is_good(simulated, tmp_path):
    environment, flwr = simulated
    app, adapter = tmp_path / "app", tmp_path / "adapter"
    shutil.copytree(ROOT / "examples" / "flower", app, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [flwr, "run", app, "here", "--stream", "--federation-config", "num-supernodes=3", "--run-config",
         f'rounds=2 evaluate=0.0 rule="flora" adapter="{adapter}"'],
        env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert adapter.is_dir(), done.stdout[-3000:]
    spec = importlib.util.spec_from_file_location("example_task", app / "lora_app" / "task.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    base = AutoModelForCausalLM.from_pretrained(task.BASE, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(task.BASE, dtype=torch.float32), adapter)
    for client in range(3):
        rows = task.rows_of(client, 3, "test")
        assert task.evaluate(tuned, rows) < 0.8 * task.evaluate(base, rows)
