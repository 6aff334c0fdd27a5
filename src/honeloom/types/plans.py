"""Plans: what will be done, as data a person can read; only the runner acts on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DropPlan", "Scores", "SelectPlan", "StagePlan"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Values of players (rows, clusters, layers), in the players' order.

    `stderr` and `count` are None where the method defines none. `columns` are further
    per-player numbers of the method, by column name.
    """

    value: tuple[float, ...]
    higher_is_better: bool
    method: str
    stderr: tuple[float, ...] | None = None
    count: tuple[int, ...] | None = None
    columns: Mapping[str, Sequence[Any]] | None = None

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True, slots=True)
class SelectPlan:
    """Indices of the rows to keep, ascending, into the usable rows."""

    keep: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DropPlan:
    """Layers whose attention or MLP goes; a dropped block stands in `block` alone.

    Indices count decoder layers from 0 and ascend.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    block: tuple[int, ...]
    metric: str
    profile: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of `drop_plan.json`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def dropped_attention(self) -> tuple[int, ...]:
        """Layers without attention, those of dropped blocks included."""
        return tuple(sorted({*self.attention, *self.block}))

    def dropped_mlp(self) -> tuple[int, ...]:
        """Layers without MLP, those of dropped blocks included."""
        return tuple(sorted({*self.mlp, *self.block}))


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One line of `--dry-run`: what a stage reads, does, and needs."""

    stage: str
    verb: str
    key: str | None
    state: str
    inputs: Mapping[str, str]
    downloads: tuple[str, ...]
    bytes_in: int
    config: Mapping[str, Any]
    push_to_hub: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)
