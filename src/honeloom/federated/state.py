"""What a server remembers between rounds, and what it writes down of each."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from honeloom.federated.frozen import FrozenAdditions, stacked
from honeloom.federated.rates import RateMemory
from honeloom.federated.scalars import ScalarLog, Sums

__all__ = ["ClientRecord", "RoundRecord", "ServerState"]

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class ClientRecord:
    """What a round had of a client; status is ok, late, rejected or absent."""

    id: str
    rank: int
    status: str = "absent"
    reason: str | None = None
    rows: int = 0
    share: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    lr: float = 0.0
    norm: float | None = None
    loss_before: float | None = None
    loss_train: float | None = None
    loss_after: float | None = None
    seconds: float | None = None


@dataclass(slots=True)
class RoundRecord:
    """What a round did.

    Attributes
    ----------
    round : int
        From 1.
    applied : bool
        False where too few clients replied in time, or their updates could not be combined: nothing changed.
    reason : str or None
        Why they could not.
    error : float or None
        Relative error of the aggregate, over all modules; None where nothing was aggregated.
    errors : dict
        The same by module.
    rank : int
        Largest rank of what was aggregated.
    seconds, server_seconds : float
        Of the whole round, and of the server's own work in it: checks, norms, aggregation, files.
    peak_rss_bytes : int
        Of the server's process so far.
    sha256 : str
        Of the state after the round.
    """

    round: int
    clients: list[ClientRecord]
    applied: bool = False
    reason: str | None = None
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    rank: int = 0
    seconds: float = 0.0
    server_seconds: float = 0.0
    peak_rss_bytes: int = 0
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a line of rounds.jsonl."""
        return asdict(self)


@dataclass(slots=True)
class ServerState:
    """All that a server must remember between rounds.

    Attributes
    ----------
    round : int
        Rounds that are done.
    shared : dict
        Where clients begin, by module, scale 1; empty before the first round and where they begin anew.
    frozen : FrozenAdditions
        To the base; what clients hold beside what they train.
    control : dict
        SCAFFOLD's correction of the server.
    moments : dict
        Of the server's optimizer.
    held : dict
        Which version of the frozen additions every client has.
    corrections : dict
        SCAFFOLD's corrections of the clients.
    rows : dict
        How many rows every client said it has when it first replied.
    norm : float
        Largest norm of an update that was aggregated.
    log : ScalarLog
        Rounds of scalars, by which clients move on the shared factors that they keep.
    pool : ndarray or None
        (K,) float64: by how much every seed of a pool moved the start so far.
    rates : RateMemory
        What earlier rounds told of the clients, for rates of their own.
    """

    round: int = 0
    shared: dict[str, Pair] = field(default_factory=dict)
    frozen: FrozenAdditions = field(default_factory=FrozenAdditions)
    control: dict[str, Pair] = field(default_factory=dict)
    moments: dict[str, Pair] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    corrections: dict[str, dict[str, Pair]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    norm: float = 0.0
    log: ScalarLog = field(default_factory=ScalarLog)
    pool: Sums | None = None
    rates: RateMemory = field(default_factory=RateMemory)

    def total(self) -> dict[str, Pair]:
        """The whole update of the base so far, as stacked factors."""
        return stacked(self.shared, self.frozen.total())

    def sha256(self) -> str:
        """Of the whole update: module names, shapes and bytes; of a pool, also its sums."""
        digest = hashlib.sha256(b"" if self.pool is None else self.pool.tobytes())
        for module, pair in sorted(self.total().items()):
            for tensor in pair:
                digest.update(f"{module}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()
