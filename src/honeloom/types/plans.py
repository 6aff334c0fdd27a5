"""Plans: what will be done, as data a person can read; only the runner acts on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "DropPlan", "Needs", "Noise", "PlannedCost", "Scores", "SelectPlan", "Setting", "StagePlan", "Volume",
]  # fmt: skip


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
class Volume:
    """How much a stage does, counted before it runs.

    Attributes
    ----------
    unknown : str or None
        Why nothing can be counted; then the rest is 0.
    rows, tokens : int
        Rows that are read, usable ones, and their tokens, each row once.
    forward_tokens, train_tokens : int
        Tokens that pass through the model without gradients, and with them, repeats counted.
    steps : int
        Optimizer steps of all tunings.
    evaluations : int
        Measurements of a model by a search, a valuation, a choice of layers or the clients of a federation.
    bytes_read, bytes_written : int
        Of weights.
    predicted : bool
        Whether rows come from an earlier stage that has not run, so that their number is a prediction.
    counted : bool
        Whether tokens were counted row by row; else they are an estimate from some rows.
    at_most : bool
        Whether it may end sooner: a search that stops, a budget that need not be spent.
    notes : tuple of str
        What is not counted.
    """

    unknown: str | None = None
    rows: int = 0
    tokens: int = 0
    forward_tokens: int = 0
    train_tokens: int = 0
    steps: int = 0
    evaluations: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    predicted: bool = False
    counted: bool = False
    at_most: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedCost:
    """What a stage costs, before it runs; all of it an estimate.

    Attributes
    ----------
    memory_bytes : int or None
        Peak of the process up to and with this stage, libraries included; on a GPU of its memory.
    disk_bytes : int
        What stays of the result.
    download_bytes : int or None
        Weights that are not here yet; None where their size is not known.
    seconds, cpu_seconds : float or None
        Where they were calibrated: elapsed, and of the processor.
    parts : mapping
        Elapsed seconds by what they are spent on.
    """

    memory_bytes: int | None = None
    disk_bytes: int = 0
    download_bytes: int | None = 0
    seconds: float | None = None
    cpu_seconds: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One line of `--dry-run`: what a stage reads, does, needs and costs."""

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
    volume: Volume | None = None
    cost: PlannedCost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `points` and `values`, those of a sweep that a stage is part of, only in one."""
        document = asdict(self)
        if not self.points:
            del document["points"], document["values"]
        return document
