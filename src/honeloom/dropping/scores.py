"""What a metric says of every attention, MLP and block: importances with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = ["KINDS", "Kind", "Score", "Unit", "UnitScores"]

Kind = Literal["attention", "mlp", "block"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "block")


class Unit(NamedTuple):
    """Attention or MLP of a layer, or `blocks` whole layers from `layer` on."""

    kind: Kind
    layer: int
    blocks: int = 1


class Score(NamedTuple):
    """An importance and its standard error over rows; None where there is none."""

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class UnitScores:
    """Importances of one metric; the lowest is dropped first.

    Attributes
    ----------
    attention, mlp, block : tuple of Score or None
        One entry per layer; None where the layer has no such half any more. Empty if the metric does
        not score units of the kind.
    consecutive : mapping
        Number of blocks n -> scores of layers i to i + n - 1, for i from 0 to L - n.
    rows, tokens : int
        Rows and tokens that were scored.
    ignored_rows : int
        Rows without any token to score.
    skipped_rows : int
        Rows left out because a number of theirs was NaN or infinite.
    """

    attention: tuple[Score | None, ...]
    mlp: tuple[Score | None, ...]
    block: tuple[Score | None, ...]
    consecutive: Mapping[int, tuple[Score | None, ...]] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    ignored_rows: int = 0
    skipped_rows: int = 0

    def of(self, kind: Kind) -> tuple[Score | None, ...]:
        """Scores of one kind of unit."""
        return {"attention": self.attention, "mlp": self.mlp, "block": self.block}[kind]

    def to_json(self) -> dict[str, Any]:
        """Content of a score file: lists of {layer, value, stderr} by kind."""
        return {
            "attention": _as_json(self.attention),
            "mlp": _as_json(self.mlp),
            "block": _as_json(self.block),
            "consecutive": {str(n): _as_json(scores) for n, scores in self.consecutive.items()},
            "rows": self.rows,
            "tokens": self.tokens,
            "ignored_rows": self.ignored_rows,
            "skipped_rows": self.skipped_rows,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> UnitScores:
        """Scores as `to_json` wrote them."""
        return cls(
            attention=_from_json(saved["attention"]),
            mlp=_from_json(saved["mlp"]),
            block=_from_json(saved["block"]),
            consecutive={int(n): _from_json(scores) for n, scores in saved["consecutive"].items()},
            rows=saved["rows"],
            tokens=saved["tokens"],
            ignored_rows=saved["ignored_rows"],
            skipped_rows=saved["skipped_rows"],
        )


def _as_json(scores: tuple[Score | None, ...]) -> list[dict[str, Any] | None]:
    return [None if s is None else {"layer": i, "value": s.value, "stderr": s.stderr} for i, s in enumerate(scores)]


def _from_json(saved: list[dict[str, Any] | None]) -> tuple[Score | None, ...]:
    return tuple(None if s is None else Score(s["value"], s["stderr"]) for s in saved)
