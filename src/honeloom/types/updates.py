"""Low-rank updates of one weight, as they come from clients and as they leave an aggregation rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Combined", "Part"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One client's update of one module: weight * scale * b @ a.

    Attributes
    ----------
    b, a : Tensor
        (m, r) and (r, n). Rank 0 stands for a client that does not change the module.
    scale : float
        alpha / r, or alpha / sqrt(r).
    weight : float
        The client's share p_k; the shares of the parts sum to 1.
    """

    b: Tensor
    a: Tensor
    scale: float
    weight: float

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.b.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """An aggregated update of one module: b @ a with scale 1, and what belongs into the base beside it.

    Attributes
    ----------
    b, a : Tensor
        (m, r) and (r, n).
    residual : (Tensor, Tensor) or None
        b' (m, q) and a' (q, n): b' @ a' is to be added to the base, so that the whole update is
        b @ a + b' @ a'.
    """

    b: Tensor
    a: Tensor
    residual: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """Columns of b, without the residual's."""
        return int(self.b.shape[1])
