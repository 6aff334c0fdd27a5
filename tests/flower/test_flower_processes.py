"""Federations in real processes on this machine: one hash whatever carries the messages; faults that cost little."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

import honeloom
from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.data.writer import convert_rows
from honeloom.federated.messages import decode_task
from honeloom.federated.rounds import InlineEngine, Silence
from honeloom.runs.journal import read_journal
from honeloom.runs.log import QuietConsole

pytest.importorskip("flwr")
pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
RANKS = {"a": 4, "b": 2, "c": 1}
SETTINGS = {"local_steps": 2, "batch_size": 2, "max_length": 64, "lr": 1e-3, "seed": 3}
FAULTS = """
import os, sys
if os.environ.get("TEST_FAULT") and "flwr-clientapp" in " ".join(sys.argv):
    import math
    import honeloom.federated.client as client
    kind, number = os.environ["TEST_FAULT"].split("@")
    handle = client.ClientCore.handle
    def broken(self, task):
        reply = handle(self, task)
        if task.round == int(number):
            for module, (b, a) in list(reply.factors.items()):
                if kind == "nan":
                    b[0, 0] = math.nan
                if kind == "shape":
                    reply.factors[module] = (b[1:].contiguous(), a)
        return reply
    client.ClientCore.handle = broken
"""
"""Put before Python's start in a node's processes: what they send in one round is spoilt."""


class Told(QuietConsole):
    """Hands on what is said."""

    def __init__(self, listener):
        self.say = listener


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Site:
    """A SuperLink with TLS and registered keys, and SuperNodes; each in a process group of its own."""

    def __init__(self, folder):
        self.folder, self.port, self.running = folder, free_port(), {}
        self.env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(folder / "home"),
                    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1",
                    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
        (folder / "home").mkdir(parents=True)
        self.certificates()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "site"\n[superlink.site]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )

    def run(self, *command):
        subprocess.run(command, cwd=self.folder, env=self.env, check=True, capture_output=True, timeout=120)

    def certificates(self):
        new = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes")
        self.run(*new, "-x509", "-days", "2", "-subj", "/CN=test", "-keyout", "ca.key", "-out", "ca.crt")
        self.run(*new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
        (self.folder / "san.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        self.run("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                 "-days", "2", "-extfile", "san.ext", "-out", "server.crt")  # fmt: skip
        for name in RANKS:
            key = ec.generate_private_key(ec.SECP384R1())
            form = (Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            (self.folder / f"{name}.key").write_bytes(key.private_bytes(*form))
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            (self.folder / f"{name}.pub").write_bytes(public)

    def start(self, name, *command, **env):
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115 - the process's
        self.running[name] = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], cwd=self.folder, env={**self.env, **env}, stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def superlink(self):
        self.start(
            "superlink", "flower-superlink", "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt",
            "--ssl-keyfile", "server.key", "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1", "--port", str(self.port), "--database", str(self.folder / "links.db"),
        )  # fmt: skip
        begun = time.monotonic()
        while time.monotonic() - begun < 90:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.3)
        pytest.fail((self.folder / "superlink.log").read_text()[-2000:])

    def supernode(self, name, fault=""):
        env = {"TEST_FAULT": fault, "PYTHONPATH": str(self.folder / "faults")} if fault else {}
        self.start(
            name, "flower-supernode", "--root-certificates", "ca.crt", "--auth-supernode-private-key", f"{name}.key",
            "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--node-config", f'client="{name}" rows="{self.folder / name}.jsonl"', **env,
        )  # fmt: skip

    def online(self, number):
        """Wait until the SuperLink knows of that many connected nodes."""
        listing = [str(BIN / "flwr"), "supernode", "list", "site", "--format", "json"]
        how = {"cwd": self.folder, "env": self.env, "check": True, "capture_output": True, "timeout": 120}
        begun = time.monotonic()
        while time.monotonic() - begun < 120:
            answer = subprocess.run(listing, **how)
            nodes = json.loads(answer.stdout)["nodes"]
            if sum(node["status"] == "online" for node in nodes) == number:
                return
            time.sleep(0.3)
        pytest.fail(f"not {number} nodes are connected: {nodes}")

    def kill(self, name, number=signal.SIGKILL):
        process = self.running.pop(name)
        # What a program started may have groups of its own: take the whole tree, leaves last.
        for child in [*tree(process.pid)][::-1]:
            try:
                os.kill(child, number)
            except ProcessLookupError:
                continue
        process.wait(30)

    def end(self):
        for name in [*self.running][::-1]:
            self.kill(name)


def tree(pid):
    """A process and all its descendants."""
    yield pid
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            yield from tree(int(folder.name))


@pytest.fixture
def site(tmp_path):
    one = Site(tmp_path / "site")
    table = RowSet.scan(resolve_sources(["lab:dev"]))
    for k, name in enumerate(RANKS):
        convert_rows(iter(table.take(range(40 * k, 40 * k + 30 + k))), "messages", one.folder / f"{name}.jsonl")
    (one.folder / "faults").mkdir()
    (one.folder / "faults" / "sitecustomize.py").write_text(FAULTS)
    try:
        yield one
    finally:
        one.end()


def clients(site, rows=True, keys=False):
    found = []
    for name, rank in RANKS.items():
        client = {"id": name, "rank": rank}
        if rows:
            client["rows"] = str(site.folder / f"{name}.jsonl")
        if keys:
            client["key"] = str(site.folder / f"{name}.pub")
        found.append(client)
    return found


def deployment(site):
    return {"engine": "deployment", "patience": 5, "deadline": 240, "clients": clients(site, rows=False, keys=True),
            "superlink": {"address": f"127.0.0.1:{site.port}", "root_certificates": str(site.folder / "ca.crt")},
            }  # fmt: skip


def test_inline_and_simulation_end_with_the_same_bytes(site, tiny_model, tmp_path):
    found = {}
    for engine in ("inline", "simulation"):
        out = tmp_path / engine
        report = honeloom.federate(
            tiny_model, clients=[{**c, "rank": 2} for c in clients(site)], rounds=2, aggregation="fedex",
            engine=engine, output_dir=out, **SETTINGS,
        )  # fmt: skip
        timed = {"seconds": 0, "server_seconds": 0, "peak_rss_bytes": 0}
        lines = [{**line, **timed} for line in read_journal(out / "rounds.jsonl")]
        for line in lines:
            for client in line["clients"]:
                client["seconds"] = 0
        found[engine] = (report.details["global_sha256"], lines, (out / "adapter_model.safetensors").read_bytes())
        assert not (out / ".flower").exists() and not (out / ".state").exists()
    assert found["inline"] == found["simulation"]


class Without(InlineEngine):
    """Loses some replies: of these clients in these rounds."""

    lost = {("a", 2), ("a", 3), ("b", 2), ("c", 3)}

    def exchange(self, tasks, deadline, needed):
        for name, reply in super().exchange(tasks, deadline, needed):
            yield name, Silence("lost") if (name, decode_task(tasks[name]).round) in self.lost else reply


def test_faults_of_a_deployment_cost_their_clients_alone(site, tiny_model, tmp_path, monkeypatch):
    """One node is killed, one sends NaN, one wrong shapes; TLS, and nodes known by their keys."""
    site.superlink()
    for name in RANKS:
        site.run(str(BIN / "flwr"), "supernode", "register", f"{name}.pub", "site")
    site.supernode("a")
    site.supernode("b", fault="nan@2")
    site.supernode("c", fault="shape@3")
    site.online(3)  # the patience below is short

    def watch(text):
        if text.startswith("round 1/"):
            site.kill("a")

    out = tmp_path / "deployed"
    report = honeloom.federate(
        tiny_model, rounds=3, quorum=0.3, output_dir=out, console=Told(watch), **SETTINGS, **deployment(site)
    )
    seen = {client["id"]: client for client in report.details["clients"]}
    assert {name: client["status"] for name, client in seen.items()} == {
        "a": ["ok", "absent", "absent"], "b": ["ok", "rejected", "ok"], "c": ["ok", "ok", "rejected"],
    }  # fmt: skip
    assert "not connected" in seen["a"]["reasons"]["2"]
    assert "NaN" in seen["b"]["reasons"]["2"] and "has shape" in seen["c"]["reasons"]["3"]
    monkeypatch.setattr("honeloom.stages.federate.InlineEngine", Without)
    inline = honeloom.federate(
        tiny_model, rounds=3, quorum=0.3, output_dir=tmp_path / "inline", clients=clients(site), **SETTINGS
    )
    assert inline.details["global_sha256"] == report.details["global_sha256"]


def test_a_killed_superlink_costs_a_resume(site, tiny_model, tmp_path):
    """Killed between rounds and started again on the same port; nodes come back by themselves."""
    straight = honeloom.federate(
        tiny_model, rounds=4, output_dir=tmp_path / "inline", clients=clients(site), aggregation="flora", **SETTINGS
    )
    site.superlink()
    for name in RANKS:
        site.run(str(BIN / "flwr"), "supernode", "register", f"{name}.pub", "site")
        site.supernode(name)

    def watch(text):  # clients hold something by now
        if text.startswith("round 2/"):
            site.kill("superlink")

    # Nodes come back at different times: wait for all of them.
    how = {**deployment(site), "patience": 200, "rounds": 4, "aggregation": "flora", "output_dir": tmp_path / "out"}
    how |= SETTINGS
    with pytest.raises(honeloom.errors.HoneloomError):
        honeloom.federate(tiny_model, console=Told(watch), **how)
    assert not (tmp_path / "out").exists()
    site.superlink()
    said = []
    report = honeloom.federate(tiny_model, console=Told(said.append), resume=True, **how)
    assert any("2 of 4 rounds were done" in text for text in said)
    assert [c["status"] for c in report.details["clients"]] == [["ok"] * 4] * 3, said
    assert report.details["global_sha256"] == straight.details["global_sha256"]
    assert json.loads((tmp_path / "out" / "partition.json").read_text())["clients"][0] == {"id": "a", "rows": 30}


MEZO = {"optimizer": {"type": "mezo", "direction": "rademacher"}, **SETTINGS, "lr": 1e-4}


@pytest.mark.parametrize(
    "changes",
    [
        {"uplink": "scalars", "aggregation": "ffa", "rates": {"statistic": "difference"}},
        {"uplink": "seed-pool", "pool_size": 64, "privacy": {"secagg": True}},
        {"uplink": "seed-pool", "pool_size": 64, "method": "full", "dtype": "fp32"},
    ],
    ids=["scalars", "secure", "full"],
)
def test_zeroth_order_clients_end_with_the_same_bytes_in_a_simulation(site, tiny_model, tmp_path, changes):
    """What clients keep from message to message, factors and secrets alike, outlives their processes."""
    found = {}
    ranks = {} if changes.get("method") == "full" else {"rank": 2}
    for engine in ("inline", "simulation"):
        report = honeloom.federate(
            tiny_model, clients=[{"id": c["id"], "rows": c["rows"], **ranks} for c in clients(site)], rounds=3,
            engine=engine, output_dir=tmp_path / engine, **{**MEZO, **changes},
        )  # fmt: skip
        assert [c["status"] for c in report.details["clients"]] == [["ok"] * 3] * 3
        found[engine] = report.details["global_sha256"]
        sent = [c["bytes_up"] for line in read_journal(tmp_path / engine / "rounds.jsonl") for c in line["clients"]]
        assert max(sent) < 30_000
    assert found["inline"] == found["simulation"]


def test_a_node_that_missed_three_rounds_rejoins_by_replay(site, tiny_model, tmp_path, monkeypatch):
    """Killed after round 1 and started again after round 4, it begins round 5 where the others do."""
    site.superlink()
    for name in RANKS:
        site.run(str(BIN / "flwr"), "supernode", "register", f"{name}.pub", "site")
        site.supernode(name)

    def watch(text):
        if text.startswith("round 1/"):
            site.kill("a")
        if text.startswith("round 4/"):
            site.supernode("a")
            site.online(3)

    how = {"rounds": 6, "quorum": 0.5, "uplink": "scalars", "aggregation": "ffa", **MEZO}
    setup = deployment(site)
    setup["clients"] = [{**client, "rank": 2} for client in setup["clients"]]
    report = honeloom.federate(
        tiny_model, output_dir=tmp_path / "deployed", console=Told(watch), **how, **{**setup, "patience": 8}
    )
    seen = {client["id"]: client for client in report.details["clients"]}
    assert seen["a"]["status"][:4] == ["ok", "absent", "absent", "absent"] and seen["a"]["status"][5] == "ok"
    assert seen["b"]["status"] == seen["c"]["status"] == ["ok"] * 6
    lost = {("a", k + 1) for k, status in enumerate(seen["a"]["status"]) if status != "ok"}
    monkeypatch.setattr("honeloom.stages.federate.InlineEngine", type("Away", (Without,), {"lost": lost}))
    inline = honeloom.federate(
        tiny_model, output_dir=tmp_path / "inline", **how, clients=[{**c, "rank": 2} for c in clients(site)]
    )
    assert inline.details["global_sha256"] == report.details["global_sha256"]
