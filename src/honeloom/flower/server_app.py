"""The server's process: rounds over Flower's grid, kept in the folder of the federation."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from honeloom.backends.devices import one_thread
from honeloom.backends.flower.engine import FlowerEngine
from honeloom.backends.flower.launch import EVENTS, EXPERIMENT, FAILED, FOLDER, LEADER
from honeloom.errors import HoneloomError
from honeloom.federated.experiment import Experiment
from honeloom.federated.rounds import run_rounds
from honeloom.federated.server import ServerCore
from honeloom.federated.settling import settle
from honeloom.federated.store import RoundStore
from honeloom.runs.atomic import write_json
from honeloom.runs.journal import Journal
from honeloom.runs.lock import is_held, writer_lock

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Go on with the federation whose folder the run's settings name, until its rounds are done.

    Raises
    ------
    HoneloomError
        It cannot go on; the message is also left where the command that started it looks.
    """
    home = Path(str(context.run_config[FOLDER]))
    try:
        experiment = Experiment.read(home / EXPERIMENT)
        store = RoundStore(experiment.folder)
        with writer_lock(home), Journal(home / EVENTS, durable=False) as events, one_thread(torch.device("cpu")):
            engine = FlowerEngine(
                grid, experiment, tell=lambda text: events.append({"text": text}),
                wanted=lambda: is_held(home / LEADER),
            )  # fmt: skip
            config = settle(experiment.config, experiment.name, engine, store.folder)
            server = ServerCore(config, experiment.name, experiment.modules, store.load())
            run_rounds(server, engine, store)
    except Exception as error:
        message = str(error) if isinstance(error, HoneloomError) else f"{type(error).__name__}: {error}"
        write_json(home / FAILED, {"message": message})
        raise
