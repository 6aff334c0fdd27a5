"""Rate and distance of zeroth-order clients where they are `auto`: each measures its loss, and the median counts."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from honeloom.errors import HoneloomError, MessageError
from honeloom.federated.continuation import continuation_of
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.messages import Manifest, TrainTask, decode_reply, encode
from honeloom.federated.rounds import Engine, Silence
from honeloom.runs.atomic import write_json
from honeloom.tuning.config import MezoTuningConfig
from honeloom.tuning.curvature import LADDER, SAFETY

__all__ = ["MEASURED", "read_measured", "settle"]

MEASURED = "curvature.json"
TOLD = ("trace", "largest", "signal", "bound", "rate", "mu")
"""What a client tells of its loss; see `honeloom.tuning.curvature`."""


def settle(config: FederateConfig, experiment: str, engine: Engine, folder: Path) -> FederateConfig:
    """Ask the clients of the first round, unless an earlier attempt did, and put numbers in the place of `auto`.

    The median of the clients' rates and distances is taken, the lower one of two: of three and more, no single client
    decides, and what cannot be is refused. A client's rate is what its own batches allow. The mean of N clients has
    a N-th of their noise, so that N times that is taken, up to `SAFETY` of what the client bears without noise.

    Parameters
    ----------
    config : FederateConfig
        Given back as it is where nothing is `auto`.
    experiment : str
        Names the federation.
    engine : Engine
        Carries messages.
    folder : Path
        Where what was measured is kept.

    Raises
    ------
    HoneloomError
        Fewer than the quorum of the clients measured.
    """
    if not config.measures:
        return config
    kept = folder / MEASURED
    if not kept.exists():
        write_json(kept, _asked(config, experiment, engine))
    found, mezo = read_measured(folder), config.optimizer
    assert isinstance(mezo, MezoTuningConfig)  # the settings have seen to it
    mu = found["mu"] if mezo.mu == "auto" else mezo.mu
    lr = found["lr"] if config.lr == "auto" else config.lr
    return config.model_copy(update={"lr": lr, "optimizer": mezo.model_copy(update={"mu": mu})})


def read_measured(folder: Path) -> dict[str, Any]:
    """Medians over the clients, and what each told; empty where nothing was measured."""
    path = folder / MEASURED
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _asked(config: FederateConfig, experiment: str, engine: Engine) -> dict[str, Any]:
    tasks = {client.id: encode(_task(config, experiment, client.id)) for client in config.members()
             if client.takes_part(1)}  # fmt: skip
    needed = max(1, math.ceil(config.quorum * len(tasks)))
    told: dict[str, dict[str, float]] = {}
    reasons = []
    for client, reply in engine.exchange(tasks, config.deadline, needed):
        try:
            told[client] = _read(client, experiment, reply)
        except MessageError as error:
            reasons.append(f"{client}: {error}")
    if len(told) < needed:
        raise HoneloomError(
            f"lr auto: {len(told)} of {len(tasks)} clients measured their loss, and {needed} must "
            f"({'; '.join(reasons)}); give lr and mu as numbers"
        )
    medians = {name: statistics.median_low(one[name] for one in told.values()) for name in TOLD}
    together = math.ceil(config.participation * len(tasks) - 1e-9)
    lr = max(medians["rate"], min(together * medians["rate"], SAFETY * medians["bound"]))
    return {**medians, "lr": lr, "clients": dict(sorted(told.items()))}


def _task(config: FederateConfig, experiment: str, client: str) -> TrainTask:
    member = next(one for one in config.members() if one.id == client)
    rank, how = member.rank_in(1, 8), continuation_of(config.aggregation.type, reset=config.starts == "reset")
    settings = {
        "batch_size": config.batch_size, "seed": config.seed, "optimizer": config.optimizer.model_dump(),
        "method": config.method, "uplink": config.uplink, "pool_size": config.pool_size,
        "horizon": _horizon(config),
    }  # fmt: skip
    alpha = config.alpha if config.alpha is not None else 2.0 * rank
    return TrainTask(
        experiment, 1, client, rank, alpha, how.start, how.trains(1), how.alike, settings=settings, phase="curvature"
    )  # fmt: skip


def _horizon(config: FederateConfig) -> float:
    """Steps that there will be, each counted by the square of its share of the largest rate."""
    shares = config.model_copy(update={"lr": 1.0})
    return config.local_steps * sum(shares.lr_in(number) ** 2 for number in range(1, config.rounds + 1))


def _read(client: str, experiment: str, reply: bytes | Silence) -> dict[str, float]:
    """What a client told; MessageError where it is no use."""
    if isinstance(reply, Silence):
        raise MessageError(reply.reason)
    found = decode_reply(reply, Manifest.of_arrays())
    if found.error is not None:
        raise MessageError(found.error)
    if found.experiment != experiment or found.client != client:
        raise MessageError("reply: of another federation or client")
    metrics: Mapping[str, float] = found.metrics
    if lacking := [n for n in TOLD if n not in metrics]:
        raise MessageError(f"reply: no {lacking[0]}")
    if not (0 < metrics["rate"] <= metrics["bound"] and LADDER[0] <= metrics["mu"] <= LADDER[-1]):
        raise MessageError(
            f"reply: rate {metrics['rate']:g} must be over 0 and at most its bound {metrics['bound']:g}, and mu "
            f"{metrics['mu']:g} from {LADDER[0]:g} to {LADDER[-1]:g}"
        )
    return {name: metrics[name] for name in TOLD}
