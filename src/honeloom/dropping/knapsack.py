"""The exact choice of drops whose importances add up: dynamic programming over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from honeloom.dropping.plan import Drops, Room, best_window, ranking, require_room
from honeloom.dropping.scores import Kind, Unit, UnitScores
from honeloom.errors import ConfigError

__all__ = ["Offer", "cheapest", "choose_drops", "choose_within", "offers_of"]

Gains = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """What may go of a layer, what it matters, and what it gives of every goal."""

    units: Drops
    score: float
    gains: Gains


class _State(NamedTuple):
    """What decides how the layers behind may be chosen."""

    gains: Gains
    attends: bool
    attention_run: int
    mlp_run: int
    open_block: bool


@dataclass(frozen=True, slots=True)
class _Way:
    """The best choice so far that leads to a state: its importance in whole numbers, its units as bits."""

    score: int
    bits: int
    last: tuple[_Way, Offer] | None

    def units(self) -> Drops:
        found: list[Unit] = []
        way: _Way = self
        while way.last is not None:
            way, offer = way.last
            found += offer.units
        return tuple(found)


def cheapest(
    offers: Sequence[Sequence[Offer]], goals: Gains, room: Room, *, exactly: bool, before: Drops = ()
) -> Drops:
    """The drops of least total importance that reach every goal, and all that the room asks for.

    Exact, ties included: they go to the higher layers, then to attention. Time grows with the layers and the number
    of different gains that sums of offers have.

    Parameters
    ----------
    offers : sequence of sequence of Offer
        Of every layer, from the first on, what may go; nothing is always an offer. Importances add up.
    goals : tuple of int
        What the gains must sum up to.
    room : Room
        Protected units must not be offered.
    exactly : bool
        Whether gains must be the goals, or at least them.
    before : tuple of Unit
        What is gone already.

    Raises
    ------
    ConfigError
        Nothing reaches the goals.

    References
    ----------
    Bellman 1957: dynamic programming.
    """
    scale = max((o.score.as_integer_ratio()[1] for layer in offers for o in layer), default=1)  # powers of 2
    attention, mlp = room.gone(before)
    start = _State(tuple(0 for _ in goals), False, 0, 0, False)
    ways: dict[_State, _Way] = {start: _Way(0, 0, None)}
    nothing = Offer((), 0.0, tuple(0 for _ in goals))
    for layer, some in enumerate(offers):
        following: dict[_State, _Way] = {}
        for offer in (nothing, *some):
            lost = {half for u in offer.units for half in (("attention", "mlp") if u.kind == "block" else (u.kind,))}
            gone = (layer in attention or "attention" in lost, layer in mlp or "mlp" in lost)
            numerator, denominator = offer.score.as_integer_ratio()
            score, bits = numerator * (scale // denominator), _bits(offer.units)
            for state, way in ways.items():
                after = _step(state, offer, gone, goals, room, exactly)
                if after is None:
                    continue
                candidate = _Way(way.score + score, way.bits | bits, (way, offer))
                held = following.get(after)
                if held is None or (candidate.score, -candidate.bits) < (held.score, -held.bits):
                    following[after] = candidate
        ways = following if exactly or len(goals) != 1 else _undominated(following)
    ends = [w for s, w in ways.items() if s.gains == goals and s.attends and not (room.native and s.open_block)]
    if not ends:
        raise ConfigError("no choice of what may go reaches that; ask for less, or protect fewer layers")
    return min(ends, key=lambda way: (way.score, -way.bits)).units()


def _bits(units: Drops) -> int:
    """A number that is larger for higher layers, and for attention."""
    bits = 0
    for unit in units:
        bits |= {"attention": 2, "mlp": 1, "block": 3}[unit.kind] << (2 * unit.layer)
    return bits


def _step(
    state: _State, offer: Offer, gone: tuple[bool, bool], goals: Gains, room: Room, exactly: bool
) -> _State | None:
    """The state behind a layer; None if that choice breaks a rule."""
    gains = tuple(a + b for a, b in zip(state.gains, offer.gains, strict=True))
    if exactly and any(g > goal for g, goal in zip(gains, goals, strict=True)):
        return None
    gains = gains if exactly else tuple(min(g, goal) for g, goal in zip(gains, goals, strict=True))
    runs = (0, 0)
    if room.max_run is not None:
        runs = (state.attention_run + 1 if gone[0] else 0, state.mlp_run + 1 if gone[1] else 0)
        if max(runs) > room.max_run:
            return None
    open_block = state.open_block
    if room.native:
        if not gone[0]:
            if open_block:
                return None
            open_block = True
        if not gone[1]:
            if not open_block:
                return None
            open_block = False
    return _State(gains, state.attends or not gone[0], *runs, open_block)


def _undominated(ways: dict[_State, _Way]) -> dict[_State, _Way]:
    """Without states from which another, no more important, has gained at least as much."""
    kept: dict[_State, _Way] = {}
    best: dict[tuple[bool, int, int, bool], tuple[int, int]] = {}
    for state, way in sorted(ways.items(), key=lambda item: -item[0].gains[0]):
        rest, value = state[1:], (way.score, -way.bits)
        if rest not in best or value < best[rest]:
            best[rest] = value
            kept[state] = way
    return kept


def offers_of(
    scores: UnitScores,
    kinds: Sequence[Kind],
    room: Room,
    gains: Mapping[Unit, Gains],
    *,
    alpha: float = 1.0,
    before: Drops = (),
) -> list[list[Offer]]:
    """Offers of every layer: each half, both, or the block, as far as they are scored and free.

    Parameters
    ----------
    gains : mapping
        Unit -> what it gives of every goal; units without an entry are not offered. A layer without both halves
        gives what they give.
    """
    value = {unit: score for score, unit in ranking(scores, kinds, alpha=alpha) if room.is_free(unit, before)}
    found: list[list[Offer]] = []
    for layer in range(room.layers):
        there = [u for u in (Unit("attention", layer), Unit("mlp", layer)) if u in value and u in gains]
        offers = [Offer((u,), value[u], gains[u]) for u in there]
        if len(there) == 2:
            both = tuple(a + b for a, b in zip(gains[there[0]], gains[there[1]], strict=True))
            offers.append(Offer(tuple(there), value[there[0]] + value[there[1]], both))
        block = Unit("block", layer)
        if block in value and block in gains:
            offers.append(Offer((block,), value[block], gains[block]))
        found.append(offers)
    return found


def choose_drops(
    scores: UnitScores,
    counts: Mapping[str, int],
    room: Room,
    *,
    alpha: float = 1.0,
    consecutive: bool = False,
    before: Drops = (),
) -> Drops:
    """Choose the least important units: a number of each kind.

    Blocks are chosen first, and nothing is chosen twice. The choice is the least important ones of a kind; with a
    longest run or whole blocks, the least sum of importances that keeps to it.

    Parameters
    ----------
    scores : UnitScores
        Importances.
    counts : mapping
        How many of "block", "attention", "mlp" and "joint" (attention or MLP, by one ranking).
    room : Room
        What may go.
    alpha : float
        Factor of attention's importances in joint choices.
    consecutive : bool
        Whether blocks go as one run.
    before : tuple of Unit
        What is gone already, in front of the result.

    Raises
    ------
    ConfigError
        More is to be dropped than there is, or nothing keeps to the rules.
    """
    after = Room(room.layers, *room.gone(before), room.protect_first, room.protect_last, room.max_run, room.native)
    require_room(counts, after)
    drops = before
    if blocks := counts.get("block", 0):
        if consecutive:
            drops = (*drops, best_window(scores, blocks, room))
        else:
            drops += _chosen(scores, ("block",), {"block": blocks}, room, 1.0, drops)
    halves = {half: counts.get(half, 0) for half in ("attention", "mlp")}
    if room.native and any(halves.values()):
        drops += _chosen(scores, ("attention", "mlp"), halves, room, alpha, drops)
    else:
        for kind in ("attention", "mlp"):
            if halves[kind]:
                drops += _chosen(scores, (kind,), {kind: halves[kind]}, room, alpha, drops)
    if joint := counts.get("joint", 0):
        drops += _chosen(scores, ("attention", "mlp"), {"joint": joint}, room, alpha, drops)
    return drops


def _chosen(
    scores: UnitScores, kinds: Sequence[Kind], counts: Mapping[str, int], room: Room, alpha: float, before: Drops
) -> Drops:
    """A number of units of some kinds, in the order in which they go."""
    order = [unit for _, unit in ranking(scores, kinds, alpha=alpha) if room.is_free(unit, before)]
    if room.native or room.max_run is not None:
        gains = {u: tuple(int(key in (u.kind, "joint")) for key in counts) for u in order}
        offers = offers_of(scores, kinds, room, gains, alpha=alpha, before=before)
        picked = set(cheapest(offers, tuple(counts.values()), room, exactly=True, before=before))
        return tuple(unit for unit in order if unit in picked)
    wanted, found = sum(counts.values()), list(before)
    for unit in order:
        if len(found) - len(before) < wanted and room.allows([*found, unit]):
            found.append(unit)
    if len(found) - len(before) < wanted:
        raise ConfigError(f"{wanted} of {' and '.join(kinds)} are asked for, and {len(found) - len(before)} may go")
    return tuple(found[len(before) :])


def choose_within(
    scores: UnitScores,
    kinds: Sequence[Kind],
    room: Room,
    gains: Mapping[Unit, Gains],
    goals: Gains,
    *,
    alpha: float = 1.0,
    before: Drops = (),
) -> Drops:
    """Choose the units of least total importance that save enough: an exact knapsack.

    Parameters
    ----------
    kinds : sequence of str
        What may go.
    gains : mapping
        Unit -> what it saves of every budgeted cost.
    goals : tuple of int
        What must be saved; 0 or less is met already.

    Returns
    -------
    tuple of Unit
        `before`, and what goes beyond it, the least important first.

    Raises
    ------
    ConfigError
        The budgets cannot be met.
    """
    needed = tuple(max(0, goal) for goal in goals)
    if not any(needed):
        return before
    offers = offers_of(scores, kinds, room, gains, alpha=alpha, before=before)
    picked = set(cheapest(offers, needed, room, exactly=False, before=before))
    return (*before, *(unit for _, unit in ranking(scores, kinds, alpha=alpha) if unit in picked))
