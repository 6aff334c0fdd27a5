"""Who sees what of a client in a federation, by mode; none of it is hidden from the process that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from honeloom.federated.continuation import follows

if TYPE_CHECKING:
    from honeloom.federated.federate_config import FederateConfig

__all__ = ["MODES", "POOL_MODE", "Exposure", "Mode", "exposure_of", "mode_of"]

Mode = Literal["flora-stack", "flora-svd", "average", "seed-pool"]
POOL_MODE = "seed-pool"
MODES: dict[str, tuple[str, ...]] = {
    "flora-stack": ("flora", "fedex"),
    "flora-svd": ("svd", "flexlora"),
    "average": ("fedit", "zero_pad", "ffa", "rolora"),
}
"""Rules by mode; the first is meant where a mode is named without a rule."""
_OTHERS = {
    "flora-stack": "each client's A and B: the stack holds them one beside the other",
    "flora-svd": "the aggregate alone, by its leading singular vectors; where there are two clients, each can take "
    "off its own part",
    "average": "the averaged factors alone; where there are two clients, each can take off its own part",
    "seed-pool": "the sum over all clients alone; where there are two, each can take off its own part",
}
_SUM = "the sum over all clients alone; all others together could take off their own parts"


@dataclass(frozen=True, slots=True)
class Exposure:
    """What the parties of a federation see.

    Attributes
    ----------
    mode : str
        Its name.
    server, clients : str
        What they see of one client.
    hidden : str
        What neither sees.
    """

    mode: str
    server: str
    clients: str
    hidden: str

    def lines(self) -> tuple[str, ...]:
        """As an operator reads it."""
        return (
            f"privacy {self.mode}",
            f"  the server sees of a client: {self.server}",
            f"  other clients see of it: {self.clients}",
            f"  neither sees: {self.hidden}",
        )


def mode_of(rule: str, uplink: str = "tensors") -> str:
    """The mode that a rule and an uplink have; a rule of a plug-in sends what it makes: the worst is assumed."""
    if uplink == POOL_MODE:
        return POOL_MODE
    return next((mode for mode, rules in MODES.items() if rule in rules), "flora-stack")


def exposure_of(config: FederateConfig) -> Exposure:
    """What the parties see under these settings."""
    mode, privacy = mode_of(config.aggregation.type, config.uplink), config.privacy
    server = {
        "tensors": "its A and B of every round",
        "scalars": "the scalars of its steps, and so its A and B of every round",
        "seed-pool": "how far it went along every seed, and so its update",
    }[config.uplink]
    others = _OTHERS[mode]
    if privacy.secagg:
        server, others = "nothing of its update but the sum over all clients", _SUM
    elif follows(config.aggregation.type, config.uplink, config.server.type):
        others = "the scalars of its steps, and so its A and B: everybody moves on by everybody's scalars"
    server += ", how many rows it has" + ("" if privacy.dp else ", its losses and how long it took")
    if config.measures:
        server += ", the curvature of its loss at the start"
    if config.engine != "deployment":
        server += "; here all clients live on one machine, rows included"
    hidden = "its rows, which may yet be inferred in part from what is seen: that is not noised"
    if privacy.dp is not None:
        hidden = "its rows: whether one of them was there shows in what is seen by no more than epsilon tells"
    return Exposure(mode, server, others, hidden)
