"""Our messages over a Flower grid: who is asked, what is waited for, and what a client process does; no processes."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from honeloom.backends.flower import engine as flower
from honeloom.backends.flower.engine import FlowerEngine, pack, public_key_hex, unpack
from honeloom.config.base import validate
from honeloom.errors import ConfigError, HoneloomError, MessageError
from honeloom.federated.client import ClientMemory
from honeloom.federated.experiment import ClientSetup, Experiment, experiment_name
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.messages import Manifest, TrainTask, decode_reply, encode
from honeloom.federated.rounds import Silence
from honeloom.federated.state import ServerState
from honeloom.flower import client_app
from honeloom.runs.lock import is_held, writer_lock

MODULES = {"q": (4, 3)}


def experiment(folder, keys=(), **changes):
    given = {"model": "m", "clients": [{"id": "a"}, {"id": "b"}, {"id": "c"}], "engine": "deployment", "patience": 0.2,
             **changes}  # fmt: skip
    config = validate(FederateConfig, given, what="test")
    return Experiment("exp", config, MODULES, folder, "m", "base", None, dict(keys))


class FakeGrid:
    """Nodes that answer after some looks; `answers` makes a reply of (node, round), or None for silence."""

    def __init__(self, nodes, answers=None):
        self.nodes, self.sent, self.numbers = dict(nodes), [], itertools.count()
        self.answers = answers or (lambda node, number: f"{self.nodes[node]['client']}-{number}".encode())
        self.waiting = {}
        self.looks = 0

    def get_nodes(self):
        self.looks += 1
        return [
            SimpleNamespace(node_id=n, public_key=node.get("key", b""))
            for n, node in self.nodes.items()
            if node.get("from", 0) <= self.looks < node.get("until", 10**9)
        ]

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            number = str(next(self.numbers))
            message.metadata.__dict__["_message_id"] = number
            self.sent.append(message)
            self.waiting[number] = message
            numbers.append(number)
        return numbers

    def pull_messages(self, numbers):
        found = []
        for number in numbers:
            message = self.waiting[number]
            node = self.nodes[message.metadata.dst_node_id]
            if message.metadata.message_type == MessageType.QUERY:
                content = pack(b"", client=node["client"])
            else:
                content = self.answers(message.metadata.dst_node_id, message.metadata.group_id)
                if content is None:
                    continue
                content = pack(content) if isinstance(content, bytes) else content
            found.append(replying(message, number, content))
            del self.waiting[number]
        return found


def replying(message, number, content):
    metadata = SimpleNamespace(reply_to_message_id=number)
    error = content if isinstance(content, Error) else None
    return SimpleNamespace(metadata=metadata, content=content, error=error, has_error=lambda: error is not None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(flower, "POLL", 0.01)
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower sets in the process of a ServerApp
        monkeypatch.setattr(TaskIdentity, name, 1)


def run(grid, folder, tasks="abc", deadline=5.0, told=None, needed=2, **changes):
    said = told if told is not None else []
    one = FlowerEngine(grid, experiment(folder, **changes), tell=said.append)
    return one, dict(one.exchange({name: f"task {name}".encode() for name in tasks}, deadline, needed))


NODES = {11: {"client": "a"}, 22: {"client": "b"}, 33: {"client": "c"}}


def test_bytes_travel_as_they_are():
    for data in (b"\x00", bytes(range(256)) * 9):
        assert unpack(pack(data, client="a")) == data
    assert unpack(pack(b"")) == b"" and unpack(RecordDict({"message": ConfigRecord({"x": 1})})) == b""


def test_every_client_gets_its_own_task_once(tmp_path):
    grid = FakeGrid(NODES)
    _, replies = run(grid, tmp_path)
    assert replies == {"a": b"a-1", "b": b"b-1", "c": b"c-1"}
    tasks = {m.metadata.dst_node_id: unpack(m.content) for m in grid.sent if m.metadata.message_type == "train"}
    assert tasks == {11: b"task a", 22: b"task b", 33: b"task c"} and len(grid.sent) == 6


def test_a_node_that_comes_later_takes_part_and_one_that_never_comes_is_absent(tmp_path):
    told = []
    grid = FakeGrid({11: {"client": "a"}, 22: {"client": "b", "from": 4}})
    _, replies = run(grid, tmp_path, told=told)
    assert replies["b"] == b"b-1"
    assert replies["c"] == Silence("its node is not connected, for 0.2 s", "absent")
    assert told == ["waiting for nodes of b, c"]  # a quorum of two was not there at first


class Shy(FakeGrid):
    """Node 33 is connected and says who it is only at its `look`."""

    look = 10**9

    def pull_messages(self, numbers):
        shy = [n for n in numbers if self.waiting[n].metadata.dst_node_id == 33 and self.looks < self.look]
        return super().pull_messages([n for n in numbers if n not in shy])


def test_a_connected_node_has_until_the_deadline_to_say_who_it_is(tmp_path):
    """A client's process may take longer to start than the patience."""
    grid = Shy(NODES)
    grid.look = 60  # a look is at least 10 ms, the patience 200 ms
    _, replies = run(grid, tmp_path, deadline=30.0)
    assert replies == {"a": b"a-1", "b": b"b-1", "c": b"c-1"} and grid.looks >= 60


def test_a_node_that_never_says_who_it_is_costs_one_deadline(tmp_path):
    told = []
    one, first = run(Shy(NODES), tmp_path, deadline=1.0, told=told)
    assert first["c"].reason == "its node is not connected, for 1 s"
    assert told == ["node 33 is connected and does not say who it is; its log may say why"]
    second = dict(one.exchange(dict.fromkeys("abc", b"t"), 1.0, 2))
    assert second["c"] == Silence("its node is not connected, for 0.2 s", "absent")


def test_a_node_that_connects_as_a_round_ends_is_waited_for_in_the_next(tmp_path):
    grid = Shy(NODES)
    one, first = run(grid, tmp_path, tasks="ab", deadline=30.0)
    assert first == {"a": b"a-1", "b": b"b-1"}
    grid.look = grid.looks + 60
    second = dict(one.exchange(dict.fromkeys("abc", b"t"), 30.0, 2))
    assert second == {"a": b"a-2", "b": b"b-2", "c": b"c-2"}


@pytest.mark.parametrize(("code", "replies"), [(8, 2), (5, 3)])
def test_a_node_that_cannot_say_who_it_is_is_not_waited_for_unless_it_was_away(tmp_path, code, replies):
    """33 fails to answer at its first 60 looks: its program is broken, or it is starting again."""

    class Failing(FakeGrid):
        def pull_messages(self, numbers):
            for found, number in zip(super().pull_messages(numbers), numbers, strict=False):
                if self.looks < 60 and self.sent[int(number)].metadata.dst_node_id == 33:
                    found.error, found.has_error = Error(code, "no module named x"), lambda: True
                yield found

    grid = Failing(NODES)
    _, got = run(grid, tmp_path, deadline=30.0)
    assert sum(isinstance(reply, bytes) for reply in got.values()) == replies
    assert replies == 3 or got["c"] == Silence("its node is not connected, for 0.2 s", "absent")


def test_a_round_without_a_quorum_waits_until_its_deadline(tmp_path):
    _, replies = run(FakeGrid({11: {"client": "a"}}), tmp_path, deadline=0.8)
    assert replies["a"] == b"a-1"
    assert {replies[n].reason for n in "bc"} == {"its node is not connected, for 1 s"}


def test_a_node_that_goes_away_with_its_task_is_absent_and_one_that_is_slow_is_late(tmp_path):
    grid = FakeGrid({**NODES, 22: {"client": "b", "until": 5}}, lambda node, number: b"x" if node == 11 else None)
    _, replies = run(grid, tmp_path, deadline=0.7)
    assert replies["a"] == b"x" and replies["b"].status == "absent"
    assert replies["c"] == Silence("no reply within 1 s", "late")


def test_a_late_reply_is_passed_on_and_does_not_answer_the_next_task(tmp_path):
    open_ = {"slow": False}
    grid = FakeGrid(NODES, lambda node, number: f"{number}".encode() if node != 33 or open_["slow"] else None)
    one, first = run(grid, tmp_path, deadline=0.3)
    assert first["c"].status == "late"
    open_["slow"] = True
    replies = list(one.exchange(dict.fromkeys("abc", b"t"), 5.0, 2))
    assert sorted(data for name, data in replies if name == "c") == [b"1", b"2"]
    assert [name for name, _ in replies].count("a") == 1


@pytest.mark.parametrize(("code", "status"), [(2, "rejected"), (8, "rejected")])
def test_a_client_whose_process_fails_is_told_with_its_last_line(tmp_path, code, status):
    grid = FakeGrid(NODES, lambda node, number: Error(code, "Traceback\n  File x\nValueError: bad\n") if node == 22
                    else b"x")  # fmt: skip
    _, replies = run(grid, tmp_path)
    assert replies["b"].status == status and "ValueError: bad" in replies["b"].reason


def test_a_node_that_went_away_with_a_task_gets_it_again(tmp_path):
    state = {"gone": True}

    def answer(node, number):
        if node == 22 and state["gone"]:
            state["gone"] = False
            return Error(5, "node unavailable")
        return b"x"

    grid = FakeGrid(NODES, answer)
    _, replies = run(grid, tmp_path)
    assert replies["b"] == b"x"
    assert sum(m.metadata.dst_node_id == 22 and m.metadata.message_type == "train" for m in grid.sent) == 2


def test_nobody_is_taken_for_a_client_that_it_is_not(tmp_path):
    told = []
    grid = FakeGrid({11: {"client": "a"}, 12: {"client": "a"}, 22: {"client": "b"}, 44: {"client": "evil"}})
    _, replies = run(grid, tmp_path, told=told)
    assert replies["a"] == b"a-1" and replies["c"].status == "absent"
    assert any("12 says that it is 'a', which another node is" in text for text in told)
    assert any("44 says that it is 'evil', none of the clients" in text for text in told)
    trained = [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"]
    assert sorted(trained) == [11, 22]


def test_another_node_takes_over_when_the_first_is_gone(tmp_path):
    grid = FakeGrid({11: {"client": "a", "until": 6}, 12: {"client": "a"}, 22: {"client": "b"}, 33: {"client": "c"}},
                    lambda node, number: None if node == 11 else b"x")  # fmt: skip
    _, replies = run(grid, tmp_path)
    assert replies == {"a": b"x", "b": b"x", "c": b"x"}


def test_answers_that_are_none_of_ours_end_nothing(tmp_path):
    """No record, a record of another kind, arrays of another kind, an unreadable key, and messages not taken."""
    strange = {
        11: RecordDict(), 22: RecordDict({"message": ArrayRecord([np.ones(3)])}),
        33: RecordDict({"message": ArrayRecord({"bytes": Array("uint8", (10**14,), "numpy.ndarray", b"x")})}),
    }  # fmt: skip
    _, replies = run(FakeGrid(NODES, lambda node, number: strange[node]), tmp_path)
    assert replies == {"a": b"", "b": b"", "c": b""}

    class Odd(FakeGrid):
        def pull_messages(self, numbers):
            for found in super().pull_messages(numbers):
                if self.looks < 3:
                    found.content = RecordDict()
                yield found

    told = []
    _, replies = run(Odd(NODES), tmp_path, told=told, deadline=0.7)
    assert {r.status for r in replies.values()} == {"absent"}
    assert any("says that it is ''" in text for text in told)
    nodes = {**NODES, 11: {"client": "a", "key": b"ssh-ed25519 AAAA nobody"}}
    _, replies = run(FakeGrid(nodes), tmp_path, keys={"a": "ff"})
    assert replies["a"].status == "absent" and replies["b"] == b"b-1"

    class Full(FakeGrid):
        def push_messages(self, messages):
            return []

    told = []
    _, replies = run(Full(NODES), tmp_path, deadline=0.5, told=told)
    assert {r.status for r in replies.values()} == {"absent"} and "did not take a message" in told[0]


def test_a_node_whose_first_answer_failed_is_asked_again(tmp_path):
    class Flaky(FakeGrid):
        failed = False

        def pull_messages(self, numbers):
            for found in super().pull_messages(numbers):
                if not self.failed:
                    self.failed, found.error, found.has_error = True, Error(8, "crashed"), lambda: True
                yield found

    _, replies = run(Flaky(NODES), tmp_path)
    assert replies == {"a": b"a-1", "b": b"b-1", "c": b"c-1"}


def test_what_is_needed_decides_how_long_the_others_are_waited_for(tmp_path):
    _, replies = run(FakeGrid({11: {"client": "a"}}), tmp_path, tasks="ac", needed=1, deadline=30.0)
    assert replies["c"] == Silence("its node is not connected, for 0.2 s", "absent")


def test_a_server_cannot_have_a_node_read_files_that_it_does_not_name(tmp_path, tiny_model, make_rows, monkeypatch):
    from honeloom.stages.inputs import resolve_model

    rows = tmp_path / "home" / "rows"
    rows.mkdir(parents=True)
    secret = make_rows(9, "secret.jsonl")
    file = {"label": "x", "path": str(secret), "format": "jsonl", "compression": "", "from_hub": False}
    (rows / "a.json").write_text(json.dumps([{"file": file, "lines": list(range(1, 10))}]))
    base = resolve_model(str(tiny_model)).fingerprint
    setup = setup_of(tmp_path, tiny_model, base, str(rows))
    mine = make_rows(4, "mine.jsonl")
    for node, simulated, count in (
        ({"client": "a", "rows": str(mine)}, None, 4), ({"client": "a", "rows": str(mine)}, tmp_path / "home", 4),
        ({"partition-id": 0}, tmp_path / "home", 9), ({"partition-id": 0}, None, 0), ({"partition-id": 0}, "/", 0),
    ):  # fmt: skip
        client_app._model.cache_clear()
        if simulated is None:
            monkeypatch.delenv("HONELOOM_SIMULATION", raising=False)
        else:
            monkeypatch.setenv("HONELOOM_SIMULATION", str(simulated))
        answer = client_app.train(message(setup, task_for("a")), context(**node))
        port = client_app._model(str(tiny_model), json.dumps(dict(setup.settings), sort_keys=True))
        found = decode_reply(unpack(answer.content), Manifest.of(port.modules, 2))
        assert found.rows == count and (found.error is None) == bool(count)


def key_pair():
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem, public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def test_a_pinned_key_must_be_the_nodes_in_either_form(tmp_path):
    (pem, ssh), (other, _) = key_pair(), key_pair()
    assert public_key_hex(pem) == public_key_hex(ssh) != public_key_hex(other) and public_key_hex(b"") == ""
    with pytest.raises(ConfigError, match="not a public key"):
        public_key_hex(b"nonsense")
    keys = {"a": public_key_hex(ssh), "b": public_key_hex(ssh)}
    told = []
    grid = FakeGrid({11: {"client": "a", "key": pem}, 22: {"client": "b", "key": other}, 33: {"client": "c"}})
    _, replies = run(grid, tmp_path, told=told, keys=keys)
    assert replies["a"] == b"a-1" and replies["c"] == b"c-1" and replies["b"].status == "absent"
    assert any("22 says that it is 'b', with another key" in text for text in told)


def test_a_federation_that_nobody_waits_for_ends(tmp_path):
    one = FlowerEngine(FakeGrid({}), experiment(tmp_path), wanted=lambda: False)
    with pytest.raises(HoneloomError, match="the command that began this federation is gone"):
        list(one.exchange({"a": b""}, 5.0, 1))
    with writer_lock(tmp_path / "leader"):
        assert is_held(tmp_path / "leader")
    assert not is_held(tmp_path / "leader") and not is_held(tmp_path / "never")


def test_clients_of_a_new_run_hold_nothing(tmp_path):
    one = FlowerEngine(FakeGrid(NODES), experiment(tmp_path))
    state = ServerState(held={"a": 3})
    one.restore(state)
    assert state.held == {}


# what the processes are told


def test_an_experiment_survives_its_file(tmp_path):
    one = experiment(tmp_path, keys={"a": "ff"})
    one.write(tmp_path / "experiment.json")
    again = Experiment.read(tmp_path / "experiment.json")
    assert again == one and again.setup() == one.setup()
    assert ClientSetup.of_text(one.setup().to_text()) == one.setup()
    with pytest.raises(MessageError, match="does not speak protocol"):
        ClientSetup.of_text(json.dumps({"protocol": 99}))


def test_the_name_of_a_federation_is_that_of_its_settings_and_inputs():
    config = validate(FederateConfig, {"model": "m", "clients": [{"id": "a"}], "engine": "deployment"}, what="test")
    other = config.model_copy(update={"lr": 0.5})
    names = {
        experiment_name(config, {"model": "x"}),
        experiment_name(config, {"model": "y"}),
        experiment_name(other, {}),
    }
    assert len(names) == 3
    inline = config.model_copy(update={"engine": "inline"})
    assert experiment_name(inline, {"model": "x"}) == experiment_name(config, {"model": "x"})


# the client's process


def context(**node):
    return Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config={})


def message(setup, task=None):
    kind = MessageType.QUERY if task is None else MessageType.TRAIN
    found = Message(pack(encode(task) if task else b"", setup=setup.to_text()), dst_node_id=7, message_type=kind)
    found.metadata.__dict__["_message_id"] = "1"
    return found


def setup_of(tmp_path, model, base, rows=None):
    settings = {"method": "lora", "targets": "all-linear", "batch_size": 2, "max_length": 32, "load_in": None,
                "dtype": "auto",
                "device": "cpu", "split": None, "limit": None, "strict": False, "max_bad": 0.01}  # fmt: skip
    return ClientSetup(("a", "b"), str(model), base, rows, settings)


def test_a_node_says_who_it_is(tmp_path):
    setup = setup_of(tmp_path, "m", "x")
    for node, name in (({"client": "hospital"}, "hospital"), ({"partition-id": 1}, "b")):
        answer = client_app.query(message(setup), context(**node))
        assert answer.content["told"]["client"] == name
    with pytest.raises(ConfigError, match="does not say which client it is"):
        client_app.query(message(setup), context(**{"partition-id": 2}))


def task_for(client, **changes):
    settings = {"steps": 1, "batch_size": 2, "lr": 1e-3, "seed": 0, "optimizer": {"type": "sgd"}, "max_grad_norm": 1.0}
    return TrainTask("exp", 1, client, 2, 4.0, "fresh", settings=settings, **changes)


def test_a_client_trains_and_remembers(tmp_path, tiny_model, make_rows):
    from honeloom.stages.inputs import resolve_model

    base = resolve_model(str(tiny_model)).fingerprint
    rows = make_rows(4, "mine.jsonl")
    node = context(client="a", rows=str(rows))
    answer = client_app.train(message(setup_of(tmp_path, tiny_model, base), task_for("a")), node)
    port = client_app._model(str(tiny_model), json.dumps(dict(setup_of(tmp_path, "m", base).settings), sort_keys=True))
    reply = decode_reply(unpack(answer.content), Manifest.of(port.modules, 2))
    assert reply.error is None and reply.rows == 4 and reply.client == "a"
    assert node.state["memory"]["round"] == 1
    old = client_app.train(message(setup_of(tmp_path, tiny_model, base), task_for("a")), node)
    assert decode_reply(unpack(old.content), Manifest.of(port.modules, 2)).error is None
    module = next(iter(port.modules))
    m, n = port.modules[module]
    frozen = {module: (torch.ones(m, 1), torch.ones(1, n))}
    client_app.train(message(setup_of(tmp_path, tiny_model, base), task_for("a", version=1, frozen=frozen)), node)
    memory = client_app._remembered(node)
    assert memory.version == 1 and torch.equal(memory.frozen[module][1], torch.ones(1, n))


@pytest.mark.parametrize(
    ("node", "base", "what"),
    [
        ({"client": "a"}, None, "names no rows"),
        ({"client": "a", "rows": "nowhere.jsonl"}, None, "nowhere.jsonl"),
        ({"client": "a", "rows": "x", "model": "nowhere/"}, None, "nowhere"),
        ({"client": "a", "rows": "x"}, "other", "is not the server's"),
    ],
)
def test_what_a_client_lacks_is_told_in_its_reply(tmp_path, tiny_model, node, base, what):
    from honeloom.stages.inputs import resolve_model

    base = base or resolve_model(str(tiny_model)).fingerprint
    answer = client_app.train(message(setup_of(tmp_path, tiny_model, base), task_for("a")), context(**node))
    reply = decode_reply(unpack(answer.content), Manifest.of(MODULES, 2))
    assert what in reply.error


def test_memory_is_empty_at_first():
    assert client_app._remembered(context()) == ClientMemory()


@pytest.mark.parametrize(
    ("dp", "fine"),
    [
        (None, False),
        ({"noise": 0.5, "clip": 1.0}, False),
        ({"noise": 2.0, "clip": 9.0}, False),
        ({"noise": 2.0, "clip": 1.0}, True),
    ],
)
def test_a_node_may_demand_noise(dp, fine):
    node = context(**{"dp-noise": 1.0, "dp-clip": 2.0})
    if fine:
        client_app._require_noise(dp, node)
    else:
        with pytest.raises(ConfigError, match=r"noise 1 or more and clip 2 or less"):
            client_app._require_noise(dp, node)
    client_app._require_noise(dp, context())
