"""Start our app on a SuperLink and wait for it: one that is there, or for a simulation one of our own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from honeloom.errors import HoneloomError
from honeloom.runs.lock import writer_lock
from honeloom.system import end_with_parent

__all__ = ["EVENTS", "EXPERIMENT", "FAILED", "FOLDER", "LEADER", "SIMULATION", "Connection", "run_app"]

FOLDER, EXPERIMENT, EVENTS, FAILED, LEADER = (
    "honeloom-folder", "experiment.json", "events.jsonl", "failed.json", "leader"
)  # fmt: skip
CONNECTION, SIMULATION = "honeloom", "HONELOOM_SIMULATION"
START, STOP = 120.0, 20.0
"""Seconds within which a SuperLink must answer, and end."""
APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "honeloom-federation"
version = "1.0.0"
description = "Federated tuning by honeloom"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "honeloom"

[tool.flwr.app.components]
serverapp = "honeloom.flower.server_app:app"
clientapp = "honeloom.flower.client_app:app"

[tool.flwr.app.config]
{folder} = ""
"""


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a SuperLink is: host:port, and the certificate of its authority; none only on this machine."""

    address: str
    root_certificates: Path | None = None


def run_app(
    home: Path, tick: Callable[[], None], *, connection: Connection | None = None, nodes: int = 0, parallel: int = 1,
    gpus: float = 0.0,
) -> None:  # fmt: skip
    """Run the federation described in `home` until its app ends.

    Parameters
    ----------
    home : Path
        Holds `experiment.json`; Flower's own files, logs and settings go below it.
    tick : callable
        Called about twice a second.
    connection : Connection, optional
        A SuperLink that runs. None: start one for a simulation, and end it.
    nodes, parallel, gpus
        Of a simulation: clients, how many at a time, and the share of a GPU that each takes.

    Raises
    ------
    HoneloomError
        The app failed, with its message; or the SuperLink did.
    """
    (home / FAILED).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(writer_lock(home / LEADER))  # the app ends once this is free
        options: list[str] = []
        if connection is None:
            connection = stack.enter_context(_simulation(home))
            sizes = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={max(1, parallel)}"
            options = ["--federation-config", f"{sizes} client-resources-num-gpus={gpus}"]
        _describe(home, connection)
        app = ["run", str(home / "app"), CONNECTION, "--run-config", str(home / "run.toml"), "--stream", *options]
        process = stack.enter_context(_process(home, "flwr", app, "run.log"))
        try:
            while process.poll() is None:
                tick()
                time.sleep(0.5)
        except BaseException:
            _stop_run(home)
            raise
        tick()
    if (home / FAILED).exists():
        raise HoneloomError(json.loads((home / FAILED).read_text())["message"])
    if process.returncode:
        if nodes == 0 and not _answers(*_place(connection.address)):
            raise HoneloomError(
                f"no SuperLink answers at {connection.address}; start it there with flower-superlink, and go on with "
                "--resume"
            )
        raise HoneloomError(f"flwr run ended with code {process.returncode}: {_tail(home / 'run.log')}")


def _describe(home: Path, connection: Connection) -> None:
    """Write the app, its settings, and where the SuperLink is."""
    (home / "app").mkdir(exist_ok=True)
    (home / "flwr").mkdir(exist_ok=True)
    (home / "app" / "pyproject.toml").write_text(APP.format(folder=FOLDER))
    (home / "run.toml").write_text(f"{FOLDER} = {json.dumps(str(home))}\n")
    security = (
        "insecure = true"
        if connection.root_certificates is None
        else f"root-certificates = {json.dumps(str(connection.root_certificates))}"
    )
    (home / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {json.dumps(connection.address)}\n{security}\n"
    )


@contextlib.contextmanager
def _simulation(home: Path) -> Iterator[Connection]:
    """A SuperLink on a free port of this machine that simulates its nodes; gone when the context ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "--insecure", "--simulation", "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port",
        str(port),
    ]  # fmt: skip
    (home / "flwr").mkdir(parents=True, exist_ok=True)
    with _process(home, "flower-superlink", command, "superlink.log", **{SIMULATION: str(home)}) as process:
        begun = time.monotonic()
        while not _answers(port) or process.poll() is not None:
            if process.poll() is not None or time.monotonic() - begun > START:
                raise HoneloomError(f"flower-superlink did not start: {_tail(home / 'superlink.log')}")
            time.sleep(0.2)
        yield Connection(f"127.0.0.1:{port}")


def _answers(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _place(address: str) -> tuple[int, str]:
    host, _, port = address.rpartition(":")
    return int(port), host.strip("[]")


@contextlib.contextmanager
def _process(
    home: Path, program: str, arguments: Sequence[str], log: str, **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    """One of Flower's programs in a process group of its own, which ends with the context."""
    with open(home / log, "ab") as out:
        process = subprocess.Popen(
            [_program(program), *arguments], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**_environment(home), **env}, start_new_session=True, preexec_fn=end_with_parent, cwd=home,
        )  # fmt: skip
    try:
        yield process
    finally:
        _end(process)


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise HoneloomError(f"{name} is not installed: pip install 'honeloom[federated]'")
    return found


def _environment(home: Path) -> Mapping[str, str]:
    """Flower's own files below `home`; its programs find each other by PATH; nothing is sent home."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ, "PATH": path, "FLWR_HOME": str(home / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: first asked to, then made to."""
    for number, wait in ((signal.SIGTERM, STOP), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _stop_run(home: Path) -> None:
    """Tell the SuperLink to stop our run, whose number stands in the log; a simulation's ends with its SuperLink."""
    words = (home / "run.log").read_text(errors="replace").split("Successfully started run ")
    number = words[-1].split()[0] if len(words) > 1 else ""
    if number.isdigit():
        with contextlib.suppress(subprocess.TimeoutExpired):  # the app notices by itself that nobody waits
            subprocess.run(
                [_program("flwr"), "stop", number, CONNECTION], env=_environment(home), cwd=home, check=False,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=30,
            )  # fmt: skip


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-4:])[:1200] if lines else f"nothing in {log}"
