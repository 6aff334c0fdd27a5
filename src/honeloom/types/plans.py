"""Plans: what will be done, as data a person can read; only the runner acts on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["DropPlan", "Needs", "Noise", "Scores", "SelectPlan", "Setting", "StagePlan"]


@dataclass(frozen=True, slots=True)
class Noise:
    """What repeated evaluations of a utility say before the budget is spent.

    Attributes
    ----------
    sd : float or None
        Standard deviation of one evaluation, in units of the utility; None where nothing was repeated.
    margin : float or None
        Mean value of a player, (v(N) - v(empty)) / n, in units of the utility.
    predicted_rho : float or None
        Predicted correlation of estimated with true values for this budget, in [0, 1].
    """

    sd: float | None
    margin: float | None
    predicted_rho: float | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Values of players (rows, clusters, layers), in the players' order.

    `stderr` and `count` are None where the method defines none; a standard error that is not
    known is infinite. `columns` are further per-player numbers of the method, by column name.
    `resolvable` says whether the values can rank the players at all, and is None where that
    is no question; `noise` is what was measured beforehand. `order` lists all players as they
    are to be taken, where that is not the order of the values. `clusters` are columns of a
    table of clusters, `cluster` and `value` among them; the column `cluster` says in which one
    a row is. `details` is what a report should say beside.
    """

    value: tuple[float, ...]
    higher_is_better: bool
    method: str
    stderr: tuple[float, ...] | None = None
    count: tuple[int, ...] | None = None
    columns: Mapping[str, Sequence[Any]] | None = None
    resolvable: bool | None = None
    noise: Noise | None = None
    order: Sequence[int] | None = None
    clusters: Mapping[str, Sequence[Any]] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

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
class Setting:
    """A usual way to do a job on a GPU: its flags, and its peak memory in bytes."""

    name: str
    flags: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What a stage that runs a model needs, per device, from the model's config alone.

    Attributes
    ----------
    unknown : str or None
        Why nothing can be said; then the rest is empty.
    parameters, tokens_per_row : int
        Of the model, and of the longest row that is assumed.
    device, dtype : str
        gpu or cpu, and the number type of the loaded weights.
    memory : mapping
        Peak bytes by part, and their "total".
    disk_bytes : int
        The result, checkpoints beside it, and the download, at most.
    settings : tuple of Setting
        Other ways to do it on GPUs.
    command, sharded_command : str
        As on the command line; the second lays one model over several GPUs.
    tokens, steps, seconds : number or None
        Of the whole job, where they were calibrated.
    """

    unknown: str | None = None
    parameters: int = 0
    device: str = ""
    dtype: str = ""
    tokens_per_row: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    disk_bytes: int = 0
    settings: tuple[Setting, ...] = ()
    command: str = ""
    sharded_command: str | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None


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
    needs: Needs | None = None
    notes: tuple[str, ...] = ()
    points: tuple[int, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `points` and `values`, those of a sweep that a stage is part of, only in one."""
        document = asdict(self)
        if not self.points:
            del document["points"], document["values"]
        return document
