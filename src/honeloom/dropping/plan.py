"""From importances to a plan: which layers lose what. Nothing is deleted here."""

from __future__ import annotations

from collections.abc import Sequence

from honeloom.errors import ConfigError
from honeloom.types.plans import DropPlan

__all__ = ["choose_drops", "lowest"]


def lowest(values: Sequence[float], count: int, *, without: Sequence[int] = ()) -> tuple[int, ...]:
    """Indices of the `count` lowest values, ascending; ties go to the lower index."""
    ranked = sorted((i for i in range(len(values)) if i not in set(without)), key=lambda i: (values[i], i))
    return tuple(sorted(ranked[:count]))


def choose_drops(
    attention: Sequence[float],
    mlp: Sequence[float],
    block: Sequence[float],
    *,
    counts: dict[str, int],
    metric: str,
    profile: str,
) -> DropPlan:
    """Choose the least important layers of each kind.

    Blocks are chosen first; their attention and MLP are not chosen again.

    Parameters
    ----------
    attention, mlp, block : sequence of float
        Importance of every layer; lower is dropped first.
    counts : dict
        How many of "attention", "mlp" and "block" go.
    metric, profile : str
        Recorded in the plan.

    Raises
    ------
    ConfigError
        More is to be dropped than there is.
    """
    blocks = lowest(block, counts["block"])
    for kind, values, taken in (("block", block, 0), ("attention", attention, len(blocks)), ("mlp", mlp, len(blocks))):
        if counts[kind] + taken > len(values):
            raise ConfigError(
                f"--{kind} {counts[kind]}: the model has {len(values)} layers"
                + (f", of which {taken} go as whole blocks" if taken else "")
                + f"; ask for at most {len(values) - taken}"
            )
    return DropPlan(
        attention=lowest(attention, counts["attention"], without=blocks),
        mlp=lowest(mlp, counts["mlp"], without=blocks),
        block=blocks,
        metric=metric,
        profile=profile,
    )
