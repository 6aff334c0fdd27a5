"""What a federated client asks of the model it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LocalJob", "LocalPort", "LocalResult", "Pairs"]

Pairs = Mapping[str, "tuple[Tensor, Tensor]"]
"""Module -> b (m, r) and a (r, n)."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalJob:
    """A few steps of one client in one round.

    Attributes
    ----------
    client : str
        Whose rows.
    start : mapping
        The adapter's factors to begin with, by module; the update they stand for is scale * b @ a.
    scale : float
        Of the adapter.
    frozen : mapping
        Additions to the base by module, with scale 1, that are not trained.
    trains : {"both", "a", "b"}
        Which factors change.
    settings : mapping
        `steps`, `batch_size`, `lr`, `optimizer`, `max_grad_norm`, `proximal`.
    correction : mapping
        Added to every gradient, by module (SCAFFOLD's c - c_i).
    order : str
        Names the order in which rows are gone through, with `seed`.
    directions : tuple of tuple of int
        Seeds of every zeroth-order step; none for steps by gradients.
    moved : (tuple of int, tuple of float)
        Without adapters: seeds along which the base's weights are to be moved first, and by how much.
    """

    client: str
    start: Pairs
    scale: float
    frozen: Pairs
    trains: Literal["both", "a", "b"]
    settings: Mapping[str, Any]
    seed: int
    order: str
    correction: Pairs = field(default_factory=dict)
    directions: tuple[tuple[int, ...], ...] = ()
    moved: tuple[tuple[int, ...], tuple[float, ...]] = ((), ())


@dataclass(frozen=True, slots=True, eq=False)
class LocalResult:
    """The adapter after the steps, and losses in nats per token before and after on some of the client's rows.

    `scalars` are those of zeroth-order steps, by step and direction; `digest` is, without adapters, that of the
    weights it began with.
    """

    factors: Pairs
    metrics: Mapping[str, float]
    scalars: tuple[tuple[float, ...], ...] = ()
    digest: str = ""


class LocalPort(Protocol):
    """The base model of one or more clients, resident, and their rows."""

    modules: Mapping[str, tuple[int, int]]

    def rows(self, client: str) -> int:
        """How many rows of a client can be trained on."""

    def train(self, job: LocalJob) -> LocalResult:
        """Train an adapter for some steps; the base is as before afterwards."""

    def measure(self, job: LocalJob) -> Mapping[str, float]:
        """What the loss of the client's rows bears where the job begins: see `honeloom.tuning.curvature`.

        `trace`, `largest`, `signal`, `bound`, `rate` and `mu`; `horizon` in the job's settings is how many steps there
        will be.
        """
