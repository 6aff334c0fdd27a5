"""What a round costs beside its training: in this process, in Flower's simulation, and over its SuperLink.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/federated/overhead.py

Three clients of ranks 8, 4, 2 make one step on one row of the lab's base model, six rounds, the same by each engine;
all must end with one hash. A round's overhead is its wall time less the server's own work, which is the same
everywhere, and less the time that its clients spent in `handle`: their sum where they take turns, the longest where
each is a process of its own. The first round, which waits for nodes, is left out. Writes OVERHEAD.md.
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import honeloom
from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.data.writer import convert_rows
from honeloom.runs.journal import read_journal

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
RANKS = {"a": 8, "b": 4, "c": 2}
SETTINGS: dict[str, Any] = {"rounds": 6, "local_steps": 1, "batch_size": 1, "max_length": 64}
GOAL = 20.0


def free_port() -> int:
    """A port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(folder: Path, name: str, *arguments: str) -> Iterator[None]:
    """One of Flower's programs, ended by its id."""
    env = {
        **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    with open(folder / f"{name}.log", "ab") as log:
        process = subprocess.Popen([str(BIN / name), *arguments], env=env, cwd=folder, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def federate(folder: Path, engine: str, files: dict[str, Path]) -> tuple[str, list[dict[str, Any]], float]:
    """Hash, rounds and wall time of the whole command."""
    clients = [{"id": name, "rank": rank} for name, rank in RANKS.items()]
    more: dict[str, Any] = {}
    with ExitStack() as stack:
        if engine == "deployment":
            port = free_port()
            link = ("--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1")
            stack.enter_context(program(folder, "flower-superlink", *link, "--port", str(port)))
            time.sleep(15)
            for name in RANKS:
                node = f'client="{name}" rows="{files[name]}"'
                stack.enter_context(
                    program(folder, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port",
                            str(free_port()), "--node-config", node)
                )  # fmt: skip
            more = {"superlink": {"address": f"127.0.0.1:{port}"}}
        else:
            clients = [{**client, "rows": str(files[str(client["id"])])} for client in clients]
        begun = time.monotonic()
        report = honeloom.federate(
            "lab:base", clients=clients, engine=engine, output_dir=folder / engine, **SETTINGS, **more
        )
        wall = time.monotonic() - begun
    return report.details["global_sha256"], list(read_journal(folder / engine / "rounds.jsonl")), wall


def overheads(rounds: Sequence[dict[str, Any]], *, together: bool) -> list[float]:
    """Seconds of every round but the first in which neither a client nor the server worked."""
    join = max if together else sum
    return [r["seconds"] - r["server_seconds"] - join(c["seconds"] for c in r["clients"]) for r in rounds[1:]]


def page(found: dict[str, tuple[str, list[dict[str, Any]], float]]) -> str:
    """The result as Markdown."""
    costs = {name: overheads(rounds, together=name == "deployment") for name, (_, rounds, _) in found.items()}
    middle = {name: statistics.median(values) for name, values in costs.items()}
    rows = [
        f"| {name} | {middle[name]:.3f} ({min(costs[name]):.3f} - {max(costs[name]):.3f}) | "
        f"{statistics.median(r['server_seconds'] for r in rounds):.3f} | {wall:.0f} |"
        for name, (_, rounds, wall) in found.items()
    ]
    ratios = {name: middle[name] / middle["inline"] for name in ("simulation", "deployment")}
    same = len({digest for digest, _, _ in found.values()}) == 1
    least = min(ratios.values())
    lacking = [] if least >= GOAL else [f"The least ratio is {least:.1f}; {GOAL:g} was the goal."]
    return "\n".join([
        "# What a round costs beside its training", "",
        "Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/federated/overhead.py`. "
        f"{platform.machine()}, a shared machine of two cores; Python {platform.python_version()}, torch "
        f"{torch.__version__}.", "",
        "Three clients of ranks 8, 4, 2, one step on one row of the lab's base model each, six rounds, by each engine.",
        "Seconds of wall time per round less those of the server's own work (checks, norms, aggregation, files) and of",
        "its clients (their sum where they take turns, the longest where each is a process of its own); median (least",
        "- most) of rounds 2 to 6. On Flower that is polling, the start of processes and, in a deployment, loading the",
        "model for every message.", "",
        "| engine | overhead per round, s | the server's own work, s | whole command, s |",
        "|---|---|---|---|", *rows, "",
        "| goal | reached | |", "|---|---|---|",
        f"| inline at least {GOAL:g} times below simulation | {ratios['simulation']:.0f} times | "
        f"{'yes' if ratios['simulation'] >= GOAL else 'no'} |",
        f"| inline at least {GOAL:g} times below deployment | {ratios['deployment']:.0f} times | "
        f"{'yes' if ratios['deployment'] >= GOAL else 'no'} |",
        f"| one hash from all three | {'one' if same else 'several'} | {'yes' if same else 'no'} |", "",
        "## Not reached", "", *(lacking or ["Nothing."]), "",
    ])  # fmt: skip


def main() -> None:
    """Measure, and write the page."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "home").mkdir()
        table, files = RowSet.scan(resolve_sources(["lab:dev"])), {}
        for k, name in enumerate(RANKS):
            files[name] = folder / f"{name}.jsonl"
            convert_rows(iter(table.take(range(20 * k, 20 * k + 20))), "messages", files[name])
        found = {name: federate(folder, name, files) for name in ("inline", "simulation", "deployment")}
    text = page(found)
    (HERE / "OVERHEAD.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
