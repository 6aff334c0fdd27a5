"""From importances to a plan: which layers lose what. Nothing is deleted here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from honeloom.dropping.normalise import is_native, normalise
from honeloom.dropping.scores import Kind, Unit, UnitScores
from honeloom.errors import ConfigError
from honeloom.types.plans import DropPlan

__all__ = [
    "Drops", "Room", "best_window", "drop_plan", "greedy", "iterative", "layer_numbers", "neighbours", "ranking",
    "require_room", "rounds_of",
]  # fmt: skip

Drops = tuple[Unit, ...]
"""Units in the order in which they go."""


@dataclass(frozen=True, slots=True)
class Room:
    """What of a decoder may go.

    Attributes
    ----------
    layers : int
        Number of layers, dropped ones included.
    without_attention, without_mlp : frozenset of int
        Layers that lack the half already.
    protect_first, protect_last : int
        Layers at both ends that stay as they are.
    max_run : int or None
        Most neighbouring layers that may lack the same half.
    native : bool
        Whether what is left must be whole blocks.
    """

    layers: int
    without_attention: frozenset[int] = frozenset()
    without_mlp: frozenset[int] = frozenset()
    protect_first: int = 0
    protect_last: int = 0
    max_run: int | None = None
    native: bool = False

    def gone(self, drops: Collection[Unit]) -> tuple[frozenset[int], frozenset[int]]:
        """Layers without attention, and without MLP, after some drops."""
        blocks = {i for u in drops if u.kind == "block" for i in range(u.layer, u.layer + u.blocks)}
        attention = {u.layer for u in drops if u.kind == "attention"}
        mlp = {u.layer for u in drops if u.kind == "mlp"}
        return self.without_attention | attention | blocks, self.without_mlp | mlp | blocks

    def is_free(self, unit: Unit, drops: Collection[Unit] = ()) -> bool:
        """Whether a unit lies outside the protected layers, and is not gone, neither whole nor in part."""
        if not (self.protect_first <= unit.layer and unit.layer + unit.blocks <= self.layers - self.protect_last):
            return False
        attention, mlp = self.gone(drops)
        covered = range(unit.layer, unit.layer + unit.blocks)
        if unit.kind == "block":
            taken = {u.layer for u in drops} | {i for u in drops for i in range(u.layer, u.layer + u.blocks)}
            return not taken.intersection(covered) and any(i not in attention or i not in mlp for i in covered)
        return unit.layer not in (attention if unit.kind == "attention" else mlp)

    def allows(self, drops: Collection[Unit]) -> bool:
        """Whether what is left after some drops keeps an attention, the longest run, and whole blocks."""
        attention, mlp = self.gone(drops)
        if len(attention) >= self.layers:
            return False
        if self.max_run is not None and max(_longest(attention), _longest(mlp)) > self.max_run:
            return False
        return not self.native or is_native(normalise(self.layers, attention, mlp))


def _longest(numbers: Collection[int]) -> int:
    """Length of the longest run of neighbours."""
    longest = run = 0
    for i in sorted(numbers):
        run = run + 1 if i - 1 in numbers else 1
        longest = max(longest, run)
    return longest


def require_room(counts: Mapping[str, int], room: Room) -> None:
    """Refuse numbers that the model cannot give, before any of it is loaded.

    Parameters
    ----------
    counts : mapping
        How many of "block", "attention", "mlp" and "joint" (attention or MLP) are asked for.

    Raises
    ------
    ConfigError
        The message has the number asked for, what there is, and the most that can be asked for.
    """
    inside = range(room.protect_first, room.layers - room.protect_last)
    absent = {"attention": room.without_attention, "mlp": room.without_mlp}
    blocks, attention, mlp, joint = (counts.get(kind, 0) for kind in ("block", "attention", "mlp", "joint"))
    free = {half: len([i for i in inside if i not in gone]) for half, gone in absent.items()}
    whole = len([i for i in inside if i not in room.without_attention or i not in room.without_mlp])
    kept = int(free["attention"] + len(room.without_attention) == room.layers)  # else a protected one remains
    most = {
        "block": min(whole, whole if not kept else whole - 1),
        "attention": max(0, free["attention"] - blocks - kept),
        "mlp": max(0, free["mlp"] - blocks),
        "joint": max(0, free["attention"] + free["mlp"] - 2 * blocks - attention - mlp - kept),
    }
    names = {"block": "blocks", "attention": "attention layers", "mlp": "MLPs", "joint": "attentions and MLPs together"}
    there = {"block": room.layers, "attention": room.layers, "mlp": room.layers, "joint": 2 * room.layers}
    lost = {"block": len(room.without_attention & room.without_mlp), "attention": len(room.without_attention),
            "mlp": len(room.without_mlp), "joint": len(room.without_attention) + len(room.without_mlp)}  # fmt: skip
    for kind, asked in (("block", blocks), ("attention", attention), ("mlp", mlp), ("joint", joint)):
        if asked > most[kind]:
            told = [f"{lost[kind]} already dropped"]
            told += [f"{blocks} go as whole blocks"] if blocks and kind != "block" else []
            told += [f"{room.layers - len(inside)} layers are protected"] if len(inside) < room.layers else []
            least = "; at least 1 attention must remain" if kind != "mlp" else ""
            raise ConfigError(
                f"--{kind} {asked}: asked {asked} {names[kind]}, and the model has {there[kind]} ({', '.join(told)})"
                f"{least}; ask for at most {most[kind]}"
            )


def ranking(scores: UnitScores, kinds: Sequence[Kind], *, alpha: float = 1.0) -> list[tuple[float, Unit]]:
    """Importances of all units of some kinds, the first to be dropped in front.

    Ties go to the higher layer, then to attention. Units that are not there have no place.

    Parameters
    ----------
    alpha : float
        Factor of attention's importances, where other kinds are ranked beside them.
    """
    factors = {"attention": alpha if len(kinds) > 1 else 1.0}
    found = [
        (score.value * factors.get(kind, 1.0), Unit(kind, layer))
        for kind in kinds
        for layer, score in enumerate(scores.of(kind))
        if score is not None
    ]
    return sorted(found, key=lambda pair: (pair[0], -pair[1].layer, pair[1].kind != "attention"))


def best_window(scores: UnitScores, blocks: int, room: Room) -> Unit:
    """The run of neighbouring blocks that matters least; ties go to the higher layers.

    Raises
    ------
    ConfigError
        No such run is free.
    """
    singles = {1: scores.block}
    found = [
        (score.value, -layer)
        for layer, score in enumerate({**singles, **scores.consecutive}[blocks])
        if score is not None
        and room.is_free(Unit("block", layer, blocks))
        and room.allows([Unit("block", layer, blocks)])
    ]
    if not found:
        raise ConfigError(
            f"no {blocks} neighbouring blocks are free (layers 0 to {room.layers - 1}, {room.protect_first} protected "
            f"at the start and {room.protect_last} at the end); ask for fewer"
        )
    return Unit("block", -min(found)[1], blocks)


def rounds_of(counts: Mapping[str, int], per_round: int, *, pairs: bool = False) -> list[dict[str, int]]:
    """Counts of every round of an iterative search: blocks first, then attention, MLP, and both together.

    Parameters
    ----------
    counts : mapping
        Of "block", "attention", "mlp" and "joint".
    per_round : int
        Units of a round.
    pairs : bool
        Whether attentions go together with as many MLPs.
    """
    found: list[dict[str, int]] = []
    left = {kind: counts.get(kind, 0) for kind in ("block", "attention", "mlp", "joint")}
    if pairs:
        while left["attention"]:
            some = min(max(1, per_round // 2), left["attention"])
            found.append({"attention": some, "mlp": some})
            left["attention"] -= some
        left["mlp"] = 0
    for kind, count in left.items():
        while count:
            found.append({kind: min(per_round, count)})
            count -= min(per_round, count)
    return sorted(found, key=lambda part: "block" not in part)


def iterative(
    rescore: Callable[[Drops], UnitScores],
    rounds: Sequence[Mapping[str, int]],
    choose: Callable[[UnitScores, Mapping[str, int], Drops], Drops],
) -> Drops:
    """Score, drop a few, score what is left, and so on.

    Parameters
    ----------
    rescore : callable
        Scores of the model after some drops; dropped units have none.
    rounds : sequence of mapping
        From `rounds_of`.
    choose : callable
        (scores, counts, drops so far) -> drops with those of the round.
    """
    drops: Drops = ()
    for counts in rounds:
        drops = choose(rescore(drops), counts, drops)
    return drops


def greedy(
    measure: Callable[[Drops], float],
    candidates: Callable[[Drops], Sequence[Drops]],
    *,
    gain: Callable[[Drops, Drops], float] | None = None,
    most: float | None = None,
) -> tuple[Drops, list[float]]:
    """Drop, one step after another, what raises a measured loss least.

    Parameters
    ----------
    measure : callable
        Loss of the model after some drops.
    candidates : callable
        What may go next, after some drops; nothing ends the search. Ties go to the first.
    gain : callable, optional
        (drops so far, what goes next) -> what that saves: then the rise of the loss per saving counts.
    most : float, optional
        End before the loss would be above this.

    Returns
    -------
    (drops, losses)
        The loss before, and after each step.

    References
    ----------
    Song et al. 2024, arXiv:2402.09025 (SLEB): blocks, one by one, by the perplexity measured anew.
    """
    drops: Drops = ()
    losses = [measure(drops)]
    while options := candidates(drops):
        measured = [measure((*drops, *option)) for option in options]
        keys = []
        for place, (option, loss) in enumerate(zip(options, measured, strict=True)):
            rise = loss - losses[-1]
            saved = gain(drops, option) if gain else 1.0
            keys.append((rise > 0, rise / saved if rise > 0 else rise, place))
        place = min(keys)[2]
        if most is not None and measured[place] > most:
            affordable = [k for k in keys if measured[k[2]] <= most]
            if not affordable:
                break
            place = min(affordable)[2]
        drops = (*drops, *options[place])
        losses.append(measured[place])
    return drops, losses


def neighbours(room: Room, drops: Collection[Unit]) -> list[Drops]:
    """Pairs of halves next to one another in what is left: without such a pair, whole blocks stay whole blocks."""
    attention, mlp = room.gone(drops)
    left: list[Unit] = []
    for layer in range(room.layers):
        left += [Unit("attention", layer)] if layer not in attention else []
        left += [Unit("mlp", layer)] if layer not in mlp else []
    pairs = [(one, other) for one, other in pairwise(left) if one.kind != other.kind]
    return [pair for pair in pairs if all(room.is_free(u, drops) for u in pair) and room.allows([*drops, *pair])]


def drop_plan(drops: Collection[Unit], *, metric: str, profile: str) -> DropPlan:
    """Drops as a plan; the halves of a dropped block stand in `block` alone."""

    def of(kind: Kind) -> tuple[int, ...]:
        return tuple(sorted(i for u in drops if u.kind == kind for i in range(u.layer, u.layer + u.blocks)))

    return DropPlan(of("attention"), of("mlp"), of("block"), metric=metric, profile=profile)


def layer_numbers(given: Sequence[bool] | Sequence[int], layers: int, what: str, *, from_end: bool) -> tuple[int, ...]:
    """Layers that were named, ascending.

    Parameters
    ----------
    given : sequence of int or of bool
        Numbers, or one true or false for every layer.
    layers : int
        Number of layers.
    what : str
        The setting, for messages.
    from_end : bool
        Whether numbers below 0 count from the end.

    Raises
    ------
    ConfigError
        A number is no layer or comes twice, or there is not one true or false for every layer.
    """
    if given and isinstance(given[0], bool):
        if len(given) != layers:
            raise ConfigError(
                f"{what}: {len(given)} times true or false, and the model has {layers} layers; give one each"
            )
        return tuple(i for i, goes in enumerate(given) if goes)
    found = []
    for number in given:
        if number < 0 and not from_end:
            raise ConfigError(
                f"{what}: {number} is below 0; numbers count from 0, or from the end with layers.from_end=true"
            )
        layer = number + layers if number < 0 else number
        if not 0 <= layer < layers:
            raise ConfigError(f"{what}: there is no layer {number}; the model has layers 0 to {layers - 1}")
        if layer in found:
            raise ConfigError(f"{what}: layer {layer} is named twice; name it once")
        found.append(layer)
    return tuple(sorted(found))
