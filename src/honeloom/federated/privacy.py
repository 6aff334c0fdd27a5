"""Who sees what of a client in a federation, by mode; none of it is hidden from the process that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from honeloom.federated.federate_config import FederateConfig

__all__ = ["MODES", "Exposure", "Mode", "exposure_of", "mode_of"]

Mode = Literal["flora-stack", "flora-svd", "average"]
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
}


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


def mode_of(rule: str) -> str:
    """The mode that a rule has; a rule of a plug-in sends what it makes, so that the worst is assumed."""
    return next((mode for mode, rules in MODES.items() if rule in rules), "flora-stack")


def exposure_of(config: FederateConfig) -> Exposure:
    """What the parties see under these settings."""
    mode = mode_of(config.aggregation.type)
    server = "its A and B of every round, how many rows it has, its losses and how long it took"
    if config.engine != "deployment":
        server += "; here all clients live on one machine, rows included"
    hidden = "its rows, which may yet be inferred in part from A and B: they are not noised"
    return Exposure(mode, server, _OTHERS[mode], hidden)
