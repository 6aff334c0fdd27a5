"""Replies of Flower clients: what an update is made of, and what is refused."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from honeloom.backends.flower.records import begin, read_factors, shapes_of
from honeloom.errors import MessageError, MissingExtraError
from honeloom.federated.frozen import Pair, Pairs
from honeloom.federated.messages import MOST_ROWS
from honeloom.federated.shares import kept_part, outliers
from honeloom.federated.state import ClientRecord
from honeloom.ops.lowrank import product_norm, stack_factors
from honeloom.types.updates import Part

try:
    from flwr.app import Message, MetricRecord, RecordDict
except ImportError as error:
    raise MissingExtraError(f"flwr is not installed ({error.name}): pip install 'honeloom[federated]'") from None

__all__ = [
    "BESIDE", "CLIENT", "SCALE", "Shapes", "Update", "client_id", "common_contents", "order_of", "read_reply",
    "refuse_outliers", "refuse_unequal_ranks", "settled_shapes",
]  # fmt: skip

Shapes = Mapping[str, tuple[int, int]]
CLIENT, SCALE, BESIDE = "partition-id", "lora-scale", "lora-beside"
"""Metrics of a reply that are about the update: who sent it, its alpha / r, and whether frozen factors were held."""
_CLOSE = 1e-5
"""Relative difference up to which a factor counts as the one that was sent: a client may hold it in its own scale."""
_log = logging.getLogger("flwr")


@dataclass(slots=True, eq=False)
class Update:
    """One client's factors, and where they began.

    Attributes
    ----------
    rows : float
        Its weight: num-examples.
    client : ClientRecord
        Its line of the round's record; status ok until it is refused.
    factors : dict
        Module -> b (m, r) and a (r, n).
    scale : float
        alpha / r.
    beside : bool
        Whether the client held what is frozen.
    content : RecordDict
        Of the message.
    begun, rest : dict
        What it began with, scale 1; and what of the shared columns it held frozen.
    """

    rows: float
    client: ClientRecord
    factors: dict[str, Pair]
    scale: float
    beside: bool
    content: RecordDict
    begun: dict[str, Pair] = field(default_factory=dict)
    rest: dict[str, Pair] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether it is not refused."""
        return self.client.status == "ok"

    def refuse(self, reason: str) -> None:
        """Leave it out of the round."""
        self.client.status, self.client.reason = "rejected", reason
        _log.warning("client %s is refused: %s", self.client.id, reason)

    def trace(self, shared: Pairs, start: str, seed: int) -> None:
        """Find what the client began with, and the norm of what it changed."""
        squares = []
        for module, (b, a) in self.factors.items():
            terms = [(b, a, self.scale)]
            if start != "fresh":  # whose B is zero
                self.begun[module], rest = begin(module, (b, a), 1.0, shared, start, seed, "shared")
                terms.append((*self.begun[module], -1.0))
                if rest is not None and self.beside:
                    self.rest[module] = rest
            squares.append(product_norm(*stack_factors(terms)) ** 2)
        self.client.norm = math.sqrt(math.fsum(squares))

    def fix(self, factor: str, rule: str) -> None:
        """Let the factor that is not trained be the one that was sent, or refuse the update if it is another."""
        for module, (b, a) in self.factors.items():
            mine, sent = (a, self.begun[module][1]) if factor == "A" else (b * self.scale, self.begun[module][0])
            if float((mine - sent).abs().max()) > _CLOSE * max(float(sent.abs().max()), 1e-30):
                self.refuse(
                    f"its {factor} of {module!r} is not the one that was sent, and {rule} needs it unchanged in this "
                    "round; use honeloom.flower.receive, or svd, which takes any factors"
                )
                return
            self.factors[module] = (b, sent) if factor == "A" else (sent, a)
        if factor == "B":
            self.scale = 1.0

    def part(self, module: str, share: float) -> Part:
        """What enters the aggregate: what was trained, and what the client held of the shared columns."""
        return kept_part(self.factors[module], self.rest.get(module), self.scale, share)


def client_id(message: Message) -> int | None:
    """The client's own number, if its reply has one."""
    if not message.has_content():
        return None
    found = [record[CLIENT] for record in message.content.metric_records.values() if CLIENT in record]
    return found[0] if len(found) == 1 and isinstance(found[0], int) else None


def order_of(message: Message) -> tuple[int, int, int]:
    """By the clients' own numbers; by node ids, which change from run to run, for those without one."""
    number, node = client_id(message), int(message.metadata.src_node_id)
    return (0, number, node) if number is not None else (1, 0, node)


def read_reply(
    message: Message, client: ClientRecord, shapes: Shapes, weight_key: str, scale: float | None, max_rank: int | None
) -> Update:  # fmt: skip
    """The update in a reply.

    Raises
    ------
    MessageError
        There is none, or it is not what was agreed.
    """
    if message.has_error():
        raise MessageError(f"the client could not train: {str(message.error.reason)[:500]}")
    content = message.content
    if len(content.array_records) != 1 or len(content.metric_records) != 1:
        raise MessageError(
            f"{len(content.array_records)} ArrayRecords and {len(content.metric_records)} MetricRecords; one of each"
        )
    arrays, metrics = next(iter(content.array_records.values())), next(iter(content.metric_records.values()))
    client.bytes_up = arrays.count_bytes()
    rows = _weight(metrics, weight_key)
    client.rows = int(rows)
    factor = metrics.get(SCALE, scale)
    if factor is None:
        raise MessageError(
            "its scale alpha / r is unknown: reply with honeloom.flower.reply, add the metric "
            f"{SCALE!r}, or give FloraStrategy(scale=...)"
        )
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
        raise MessageError(f"{SCALE} is {factor!r}; a number over 0")
    factors = read_factors(arrays, shapes or None)
    if not factors:
        raise MessageError("it holds no factors")
    client.rank = max(b.shape[1] for b, _ in factors.values())
    if odd := [m for m, (b, a) in factors.items() if b.shape[1] > max(b.shape[0], a.shape[1])]:
        raise MessageError(f"rank {client.rank} of {odd[0]!r:.120} is over what a matrix of its shape can need")
    if max_rank is not None and client.rank > max_rank:
        raise MessageError(f"rank {client.rank}; at most {max_rank} is accepted (max_rank)")
    client.status = "ok"
    return Update(rows, client, factors, float(factor), bool(metrics.get(BESIDE, 0)), content)


def _weight(metrics: Mapping[str, Any], key: str) -> float:
    value = metrics.get(key)
    if not isinstance(value, int | float) or not 0 < value <= MOST_ROWS:  # NaN is neither
        raise MessageError(f"metric {key!r} is {value!r}; a number over 0, such as the client's rows")
    return float(value)


def settled_shapes(updates: Sequence[Update], shapes: Shapes) -> Shapes:
    """Modules and shapes that are agreed, or those that most updates have; others are refused."""
    if shapes or not updates:
        return shapes
    kinds = Counter(tuple(shapes_of(update.factors).items()) for update in updates)
    (first, votes), *others = kinds.most_common()
    tie = bool(others) and others[0][1] == votes
    for update in updates:
        mine = tuple(shapes_of(update.factors).items())
        if tie or mine != first:
            odd = sorted({m for m, _ in set(mine) ^ set(first)} or {m for m, _ in mine})
            update.refuse(
                f"its {len(mine)} modules or their shapes are not those of the others (first {odd[0]!r}); "
                + (
                    "which are right cannot be told, give initial_arrays"
                    if tie
                    else "adapt the same modules everywhere"
                )
            )
    return dict(first)


def refuse_unequal_ranks(updates: Sequence[Update], shared: Pairs, rule: str) -> None:
    """For rules that average factors as they are: ranks as before, or as most have them."""
    sound = [update for update in updates if update.sound]
    ranks = {id(u): tuple(b.shape[1] for b, _ in u.factors.values()) for u in sound}
    if shared:
        usual = tuple(b.shape[1] for _, (b, _) in sorted(shared.items()))
    elif ranks:
        usual = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    for update in sound:
        if ranks[id(update)] != usual:
            update.refuse(
                f"its rank is {max(ranks[id(update)])}, and {rule} averages factors column by column, of rank "
                f"{max(usual)} here; svd and flora take any ranks"
            )


def refuse_outliers(updates: Sequence[Update], times: float) -> None:
    """Refuse updates whose norm is many times the median of the others', where there are enough to tell."""
    sound = [update for update in updates if update.sound]
    for place, reason in outliers([update.client.norm or 0.0 for update in sound], times).items():
        sound[place].refuse(reason)


def common_contents(messages: Iterable[RecordDict], weight_key: str) -> list[RecordDict]:
    """Contents with those metrics that all of them have, as Flower's averages need them."""
    found = []
    for content in messages:
        records = list(content.metric_records.values())
        try:
            if len(records) != 1:
                raise MessageError(f"{len(records)} MetricRecords; one is needed")
            _weight(records[0], weight_key)
        except MessageError as error:
            _log.warning("metrics of a client are left out: %s", error)
            continue
        found.append((content, records[0]))
    kinds = [{k: len(v) if isinstance(v, list) else -1 for k, v in record.items()} for _, record in found]
    shared = [k for k in (kinds[0] if kinds else {}) if all(kind.get(k) == kinds[0][k] for kind in kinds)]
    keys = [k for k in shared if k not in (CLIENT, SCALE, BESIDE)]
    return [
        RecordDict({**dict(content.array_records), "metrics": MetricRecord({k: record[k] for k in keys})})
        for content, record in found
    ]
