"""What a router is made from, and what it gives: the gate of one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from honeloom.ops.lowrank import LinearMap

__all__ = ["Evidence", "Gate", "as_mlp"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known at one gate. Only what the router's settings ask for is there.

    Attributes
    ----------
    name : str
        Of the gate; random numbers follow from it and the seed.
    experts, width : int
        E, and the size H of what the gate receives.
    intercept : bool
        Whether the written gate can have a bias.
    positive, negative : tuple of Tensor
        Per expert (n, H): what the gate receives for its prompts, one vector each.
    vectors : Tensor or None
        (N, H): what the gate receives for tokens or rows.
    rows : Tensor or None
        (N,) int64: the row of each vector.
    labels : Tensor or None
        (R,) int64: the expert of each row.
    pooled : Tensor or None
        (R, P): one vector per row, equal at all gates of a mixture.
    losses : Tensor or None
        (R, E): what each row costs each expert.
    changes : tuple of LinearMap
        Per expert (m, H): the task vector of what multiplies the gate's input.
    """

    name: str
    experts: int
    width: int
    seed: int = 0
    intercept: bool = False
    positive: tuple[torch.Tensor, ...] = ()
    negative: tuple[torch.Tensor, ...] = ()
    vectors: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    changes: tuple[LinearMap, ...] = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """The tensors of a gate by their names below it, and how well it tells the rows apart that it was not made from.

    `tensors` has `weight` (E, H) and maybe `bias` (E,); or `basis` (E, r, H); or those of an MLP.
    """

    tensors: dict[str, torch.Tensor]
    accuracy: float | None = None
    floor: float | None = None
    """Accuracy of always naming the largest class."""


def as_mlp(gate: Gate, width: int, noise: torch.Tensor) -> Gate:
    """Write a linear gate as an MLP with one hidden layer that gives the same scores, as a beginning of training.

    A pair of hidden units h and -h with output weights 1 and -1 is the identity for ReLU, SiLU and GELU alike. Units
    beyond those of the gate have random input weights and no output.

    Parameters
    ----------
    gate : Gate
        Linear, E experts.
    width : int
        Hidden units, 2 E at least.
    noise : Tensor
        (width - 2 E, H).

    Returns
    -------
    Gate
        `up.weight` (width, H), `down.weight` (E, width), and `down.bias` if the gate has a bias.
    """
    weight = gate.tensors["weight"]
    experts = weight.shape[0]
    if width < 2 * experts:
        raise ValueError(f"width {width}: must be at least twice the number of experts, {2 * experts}")
    down = torch.zeros(experts, width, dtype=weight.dtype)
    diagonal = torch.arange(experts)
    down[diagonal, diagonal], down[diagonal, experts + diagonal] = 1.0, -1.0
    tensors = {"up.weight": torch.cat((weight, -weight, noise.to(weight.dtype))), "down.weight": down}
    if "bias" in gate.tensors:
        tensors["down.bias"] = gate.tensors["bias"]
    return Gate(tensors, gate.accuracy, gate.floor)
