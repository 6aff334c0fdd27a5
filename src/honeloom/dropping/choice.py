"""The whole choice of `drop`: numbers of units, budgets and searches, on scores and losses that are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from honeloom.dropping.budget import COSTS
from honeloom.dropping.config import DropConfig, LayersConfig
from honeloom.dropping.cost import Cost
from honeloom.dropping.knapsack import choose_drops, choose_within
from honeloom.dropping.plan import Drops, Room, greedy, iterative, layer_numbers, neighbours, ranking, rounds_of
from honeloom.dropping.scores import Kind, Unit, UnitScores
from honeloom.errors import ConfigError

__all__ = ["Ports", "choose", "named_drops"]


@dataclass(frozen=True, slots=True)
class Ports:
    """What a choice asks for.

    Attributes
    ----------
    scores : callable
        Importances of the model after some drops.
    loss : callable
        Mean loss of the model after some drops, in nats per token.
    units : mapping
        What every unit costs; asked for by budgets alone.
    before : Cost
        What the source costs.
    """

    scores: Callable[[Drops], UnitScores]
    loss: Callable[[Drops], float]
    units: Mapping[Unit, Cost]
    before: Cost


def choose(config: DropConfig, room: Room, ports: Ports) -> Drops:
    """Choose what goes, in the order in which it goes.

    Numbers of units come first; budgets take what is missing from `config.kinds`, by the least total importance that
    meets all of them (one_shot), or step by step (iterative, greedy). A loss_increase alone is used up as far as it
    reaches; beside others it is a condition.

    Raises
    ------
    ConfigError
        The numbers or budgets cannot be met.
    """
    if config.layers is not None:
        return named_drops(config.layers, room)
    search = _Search(config, room, ports)
    drops = {"one_shot": search.one_shot, "iterative": search.iterative, "greedy": search.greedy}[config.choice]()
    search.require_loss(drops)
    return drops


def named_drops(layers: LayersConfig, room: Room) -> Drops:
    """The layers that were named.

    Raises
    ------
    ConfigError
        A number is none of a layer, comes twice or is gone already, or no attention would be left.
    """
    kinds: tuple[tuple[Kind, Sequence[int]], ...] = (
        ("block", layers.block), ("attention", layers.attention), ("mlp", layers.mlp),
    )  # fmt: skip
    drops: Drops = ()
    for kind, given in kinds:
        for layer in layer_numbers(given, room.layers, f"layers.{kind}", from_end=layers.from_end):
            if not room.is_free(Unit(kind, layer), drops):
                raise ConfigError(f"layers.{kind}: layer {layer} is named for another drop too, or dropped already")
            drops = (*drops, Unit(kind, layer))
    if not drops:
        raise ConfigError("layers names no layer; give numbers of attention, mlp or block")
    if len(room.gone(drops)[0]) >= room.layers:
        raise ConfigError(f"layers: all {room.layers} attentions would be gone, and at least 1 must remain")
    return drops


class _Search:
    """A choice in the making."""

    def __init__(self, config: DropConfig, room: Room, ports: Ports) -> None:
        self.config, self.room, self.ports = config, room, ports
        self.keys = [COSTS[b.key] for b in config.budgets if b.key in COSTS]
        before = ports.before
        self.goals = tuple(
            math.ceil(before.of(COSTS[b.key]) - b.limit(before.of(COSTS[b.key])))
            for b in config.budgets
            if b.key in COSTS
        )
        self.rise = next((b for b in config.budgets if b.key == "loss_increase"), None)
        self.alone = self.rise is not None and not self.goals and not any(config.counts.values())

    def saved(self, unit: Unit) -> tuple[int, ...]:
        """What a unit saves of every budgeted cost."""
        return tuple(self.ports.units[unit].of(key) for key in self.keys)

    def left(self, drops: Drops) -> tuple[int, ...]:
        """What is still to be saved."""
        gained = [self.saved(u) for unit in drops for u in _singles(unit)] or [tuple(0 for _ in self.keys)]
        return tuple(max(0, goal - sum(some)) for goal, some in zip(self.goals, zip(*gained, strict=True), strict=True))

    def limit(self) -> float:
        """The most that the loss may be."""
        assert self.rise is not None  # asked for where there is a budget on the loss
        whole = self.ports.loss(())
        return whole + self.rise.limit(whole)

    def require_loss(self, drops: Drops) -> None:
        """Refuse drops that other settings ask for and that cost more than allowed."""
        if self.rise is None:
            return
        whole, loss = self.ports.loss(()), self.ports.loss(drops)
        if loss > whole + self.rise.limit(whole):
            raise ConfigError(
                f"budget {self.rise}: what is asked for raises the loss from {whole:.4f} to {loss:.4f} nats per token, "
                f"and {whole + self.rise.limit(whole):.4f} is the most allowed; ask for less, or heal a plan without "
                "this budget"
            )

    def one_shot(self) -> Drops:
        config = self.config
        scores = self.ports.scores(())
        drops = choose_drops(scores, config.counts, self.room, alpha=config.alpha, consecutive=config.consecutive)
        if self.alone:
            return self.within_loss(scores)
        if self.goals:
            gains = {unit: self.saved(unit) for unit in self.ports.units}
            return choose_within(
                scores, config.kinds, self.room, gains, self.left(drops), alpha=config.alpha, before=drops
            )
        return drops

    def within_loss(self, scores: UnitScores) -> Drops:
        """Go on in the order of importance as long as the measured loss allows."""
        limit = self.limit()
        drops: Drops = ()
        while options := self.options(drops, self.config.kinds):
            step = min(options, key=lambda option: self.importance(scores, option))
            if self.ports.loss((*drops, *step)) > limit:
                break
            drops = (*drops, *step)
        return drops

    def importance(self, scores: UnitScores, option: Drops) -> tuple[float, int, bool]:
        """By what options are ranked: their importance, ties as in `ranking`."""
        value = {unit: score for score, unit in ranking(scores, self.config.kinds, alpha=self.config.alpha)}
        total = sum(value.get(unit, math.inf) for unit in option)
        return total, -option[0].layer, option[0].kind != "attention"

    def iterative(self) -> Drops:
        config = self.config

        def take(scores: UnitScores, counts: Mapping[str, int], drops: Drops) -> Drops:
            return choose_drops(scores, counts, self.room, alpha=config.alpha, before=drops)

        rounds = rounds_of(config.counts, config.per_round, pairs=config.pairs)
        drops = iterative(self.ports.scores, rounds, take)
        limit = self.limit() if self.alone else math.inf
        while self.alone or any(self.left(drops)):
            scores, before = self.ports.scores(drops), drops
            while len(drops) < len(before) + config.per_round and (self.alone or any(self.left(drops))):
                options = self.options(drops, config.kinds)
                if not options:
                    break
                drops = (*drops, *min(options, key=lambda option: self.importance(scores, option)))
            if self.alone and (drops == before or self.ports.loss(drops) > limit):
                return before
            if drops == before:
                raise self.unreachable()
        return drops

    def greedy(self) -> Drops:
        def candidates(drops: Drops) -> Sequence[Drops]:
            counted = self.counted(drops)
            if counted is not None:
                return counted
            if not self.alone and not any(self.left(drops)):
                return ()
            options = self.options(drops, self.config.kinds)
            if not options and not self.alone:
                raise self.unreachable()
            return options

        def gain(drops: Drops, option: Drops) -> float:
            left = self.left(drops)
            if not any(left):
                return 1.0
            pairs = [(self.saved(u), left) for unit in option for u in _singles(unit)]
            return sum(s / n for some, need in pairs for s, n in zip(some, need, strict=True) if n)

        most = self.limit() if self.alone else None
        return greedy(self.ports.loss, candidates, gain=gain if self.goals else None, most=most)[0]

    def options(self, drops: Drops, kinds: Sequence[Kind]) -> list[Drops]:
        """What may go next; under budgets only what saves something that is still to be saved."""
        found: list[Drops] = []
        if self.room.native and {"attention", "mlp"} <= set(kinds):
            found += neighbours(self.room, drops)
        singles = ("block",) if self.room.native else ("attention", "mlp", "block")
        for kind in singles:
            units = [Unit(kind, i) for i in reversed(range(self.room.layers))] if kind in kinds else []  # type: ignore[arg-type]
            found += [(u,) for u in units if self.room.is_free(u, drops) and self.room.allows((*drops, u))]
        if not self.goals:
            return found
        left = self.left(drops)
        return [o for o in found if any(n and sum(self.saved(u)[i] for u in o) for i, n in enumerate(left))]

    def counted(self, drops: Drops) -> list[Drops] | None:
        """What may go next of the numbers asked for; None when they are reached."""
        left = dict(self.config.counts)
        for unit in drops:
            kind = unit.kind if left[unit.kind] else "joint"
            left[kind] -= 1
        if not any(n > 0 for n in left.values()):
            return None
        kinds = [k for k in ("attention", "mlp", "block") if left[k] > 0 or (k != "block" and left["joint"] > 0)]
        options = [o for o in self.options_of_counts(drops, kinds) if self.fits(o, left)]  # type: ignore[arg-type]
        if not options:
            raise ConfigError("the numbers asked for cannot be reached; ask for less, or protect fewer layers")
        return options

    def options_of_counts(self, drops: Drops, kinds: Sequence[Kind]) -> list[Drops]:
        """`options`, whatever the budgets still need."""
        goals, self.goals = self.goals, ()
        try:
            return self.options(drops, kinds)
        finally:
            self.goals = goals

    @staticmethod
    def fits(option: Drops, left: Mapping[str, int]) -> bool:
        """Whether numbers are left for all units of an option."""
        rest = dict(left)
        for unit in option:
            kind = unit.kind if rest[unit.kind] > 0 else "joint"
            if unit.kind == "block" and kind == "joint":
                return False
            rest[kind] -= 1
        return all(n >= 0 for n in rest.values())

    def unreachable(self) -> ConfigError:
        asked = ", ".join(str(b) for b in self.config.budgets)
        return ConfigError(f"budget {asked}: nothing that may go reaches it; raise it, or protect fewer layers")


def _singles(unit: Unit) -> list[Unit]:
    """A run of blocks as single ones."""
    return [Unit(unit.kind, i) for i in range(unit.layer, unit.layer + unit.blocks)]
