"""SCAFFOLD: what every client's gradients are corrected by, kept by the server alone.

References
----------
Karimireddy et al. 2020, arXiv:1910.06378.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honeloom.federated.messages import Factors
from honeloom.federated.state import ServerState

__all__ = ["correct", "correction"]

Pair = tuple[torch.Tensor, torch.Tensor]


def correction(state: ServerState, client: str) -> dict[str, Pair]:
    """What a client adds to its gradients, c - c_i."""
    mine = state.corrections.get(client, {})
    return {module: _minus(c, mine.get(module)) for module, c in state.control.items()}


def correct(state: ServerState, ways: Sequence[tuple[str, float, Factors, Factors]], everybody: int) -> None:
    """Let c_i become c_i - c + (start - end) / (steps x lr), and move c by the mean of the changes.

    All of it follows from what the server has sent and got, so that clients need not keep or send corrections.

    Parameters
    ----------
    state : ServerState
        Changed in place.
    ways : sequence
        Of every client: its name, steps x lr, and its factors before and after.
    everybody : int
        Clients that there are in the round.
    """
    moves: dict[str, Pair] = {}
    for client, unit, begun, ended in ways:
        mine = state.corrections.setdefault(client, {})
        for module, after in ended.items():
            moved = [(s - f) / unit for s, f in zip(begun[module], after, strict=True)]
            change = _minus((moved[0], moved[1]), state.control.get(module))
            mine[module] = _plus(mine.get(module), change)
            moves[module] = _plus(moves.get(module), change)
    for module, (b, a) in moves.items():
        state.control[module] = _plus(state.control.get(module), (b / everybody, a / everybody))


def _plus(one: Pair | None, other: Pair) -> Pair:
    return other if one is None else (one[0] + other[0], one[1] + other[1])


def _minus(one: Pair, other: Pair | None) -> Pair:
    return one if other is None else (one[0] - other[0], one[1] - other[1])
