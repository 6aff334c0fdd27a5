"""A Flower strategy under which clients that exchange LoRA factors are combined by one of honeloom's rules."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from honeloom.backends.flower.records import PREFIX, read_factors, shapes_of, write_factors
from honeloom.backends.flower.replies import (
    CLIENT,
    Shapes,
    Update,
    client_id,
    common_contents,
    order_of,
    read_reply,
    refuse_outliers,
    refuse_unequal_ranks,
    settled_shapes,
)
from honeloom.checkpoint.adapter_writer import combined_config, write_adapter
from honeloom.checkpoint.writer import TensorStream
from honeloom.errors import ConfigError, HoneloomError, IncompatibleModelsError, MessageError, MissingExtraError
from honeloom.federated.aggregation.exactness import error_norms
from honeloom.federated.aggregation.warm import whole
from honeloom.federated.config import AggregationRule
from honeloom.federated.continuation import Continuation, continuation_of
from honeloom.federated.federate_config import EQUAL_RANKS
from honeloom.federated.frozen import Pair, Pairs, folded, stacked
from honeloom.federated.state import ClientRecord, RoundRecord
from honeloom.registry import family
from honeloom.types.updates import Combined

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg, Result
except ImportError as error:
    raise MissingExtraError(f"flwr is not installed ({error.name}): pip install 'honeloom[federated]'") from None

__all__ = ["FloraStrategy"]

_log = logging.getLogger("flwr")


class FloraStrategy(FedAvg):  # type: ignore[misc]
    """Combines LoRA updates, not their factors: sum of p_k s_k B_k A_k, for clients of any rank.

    FedAvg's mean of B times its mean of A is not the mean of the updates. Sampling and the averages of
    metrics are FedAvg's; a reply that is of no use is refused, and the run goes on with the others.

    Parameters
    ----------
    rule : str, mapping or MethodConfig
        One of `honeloom.federated.METHODS`: a name, {"type": "svd", "rank": 8}, or its settings.
    scale : float, optional
        alpha / r of clients that do not tell theirs and use no `honeloom.flower.receive`. What is sent
        down is then written for this scale, so that they can load it as it is.
    quorum : float
        Share of the clients asked without whom a round changes nothing.
    outlier : float
        An update whose norm is this many times the median of the others is refused, from three on.
    max_rank : int, optional
        Largest rank that is accepted.
    seed : int
        Of the first A, and of random columns with which errors of high ranks are measured.
    **fedavg
        What FedAvg takes: fraction_train, min_train_nodes, min_available_nodes, weighted_by_key, ...

    Attributes
    ----------
    records : list of RoundRecord
        What every round did: each client with its status, reason, rank, rows, bytes and norm; the
        relative error of the aggregate by module; a hash of the result.

    References
    ----------
    Wang et al. 2024 (FLoRA), arXiv:2409.05976; the default rule: Eckart and Young 1936, doi:10.1007/BF02288367.
    """

    def __init__(
        self, rule: str | Mapping[str, Any] | Any = "svd", *, scale: float | None = None, quorum: float = 0.5,
        outlier: float = 10.0, max_rank: int | None = None, seed: int = 0, **fedavg: Any,
    ) -> None:  # fmt: skip
        super().__init__(**fedavg)
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"scale {scale}: alpha / r of the clients, a number over 0")
        if not 0 < quorum <= 1 or not outlier > 1:
            raise ConfigError(f"quorum {quorum} must be in (0, 1] and outlier {outlier} over 1")
        self.rule = _settings(rule)
        self.scale, self.quorum, self.outlier, self.max_rank, self.seed = scale, quorum, outlier, max_rank, seed
        self.records: list[RoundRecord] = []
        self._how: Continuation = continuation_of(self.rule.type)
        self._combine: Callable[..., Combined] = family("aggregation").load(self.rule.type)
        self._shapes: Shapes = {}
        self._shared: dict[str, Pair] = {}
        self._frozen: dict[str, Pair] = {}
        self._current: ArrayRecord | None = None
        self._asked: list[int] = []
        self._bytes_down = 0

    def summary(self) -> None:
        """Log the settings."""
        super().summary()
        _log.info("\t└──> LoRA updates: rule '%s', quorum %.2f, outlier %g", self.rule.type, self.quorum, self.outlier)

    def start(self, grid: Grid, initial_arrays: ArrayRecord | None = None, *args: Any, **more: Any) -> Result:
        """Run the federation, as every Flower strategy does; without initial arrays, clients begin with fresh adapters.

        Parameters
        ----------
        grid : Grid
            Flower's.
        initial_arrays : ArrayRecord, optional
            A PEFT state dict whose B is zero, which tells the modules and the first A; or an update
            to go on from, with `scale` given (1.0 for the arrays of an earlier run).
        *args, **more
            num_rounds, timeout, train_config, evaluate_config, evaluate_fn.
        """
        return super().start(grid, ArrayRecord() if initial_arrays is None else initial_arrays, *args, **more)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of a round: everything that a client without a memory needs."""
        self._adopt(arrays)
        down = self._down()
        messages = list(super().configure_train(server_round, down, self._told(config, server_round), grid))
        self._asked = [message.metadata.dst_node_id for message in messages]
        self._bytes_down = down.count_bytes()
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages that ask for the loss of the base with the whole update."""
        self._adopt(arrays)
        return list(super().configure_evaluate(server_round, self._down(), self._told(config, server_round), grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine what came and is sound.

        Returns
        -------
        arrays : ArrayRecord or None
            The whole update under PEFT's names, to be read with `scale`, or 1; None below the quorum.
        metrics : MetricRecord
            The clients' metrics, weighted; and relative-error, rank, refused, bytes-up, bytes-down.
        """
        begun = time.monotonic()
        record = RoundRecord(server_round, [])
        updates = self._read(record, sorted(replies, key=order_of))
        shapes = settled_shapes(updates, self._shapes)
        self._judge(updates, server_round)
        sound = [update for update in updates if update.sound]
        if sound and len(sound) >= self.quorum * len(record.clients):
            record.applied = self._apply(record, sound, shapes)
        else:
            _log.warning("round %d: %d of %d replies are sound; nothing changed",
                         server_round, len(sound), len(record.clients))  # fmt: skip
        record.seconds = time.monotonic() - begun
        self.records.append(record)
        return (self._current if record.applied else None), self._metrics(record, sound)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average of the clients' metrics; replies without them are left out, and the run goes on."""
        replies = [message for message in sorted(replies, key=order_of) if message.has_content()]
        contents = common_contents([message.content for message in replies], self.weighted_by_key)
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None

    def save(self, path: str | Path, *, base_model: str = "", task_type: str | None = "CAUSAL_LM") -> Path:
        """Write the whole update as a PEFT adapter, which `PeftModel.from_pretrained(base, path)` loads.

        Parameters
        ----------
        path : path
            A folder.
        base_model : str
            Id or path of the base, for the adapter's config.
        task_type : str or None
            PEFT's.

        Raises
        ------
        HoneloomError
            No round has changed anything yet.
        """
        total = folded(self.update())
        if not total:
            raise HoneloomError("there is no update to save: no round had enough sound replies; see strategy.records")
        like = {
            "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_model or None,
            "bias": "none", "lora_dropout": 0.0,
        }  # fmt: skip
        config = combined_config([like], {module: b.shape[1] for module, (b, _) in total.items()}, same=False)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        streams = [
            TensorStream.of(f"{PREFIX}{module}.lora_{name}.weight", tensor)
            for module, (b, a) in sorted(total.items())
            for name, tensor in (("A", a.contiguous()), ("B", b.contiguous()))
        ]
        write_adapter(folder, config, streams)
        return folder

    def update(self) -> dict[str, Pair]:
        """The whole update of the base so far: module -> b (m, r) and a (r, n), scale 1."""
        return stacked(self._shared, self._frozen)

    def _adopt(self, arrays: ArrayRecord) -> None:
        """Take arrays as the state, unless they are what the last round gave."""
        if arrays is self._current or (self._current is not None and arrays == self._current):
            return
        try:
            pairs = read_factors(arrays)
        except MessageError as error:
            raise ConfigError(f"initial_arrays: {error}") from None
        empty = not any(bool(b.any()) for b, _ in pairs.values())
        if self.scale is None and not empty:
            raise ConfigError(
                "initial_arrays hold an update (B is not zero), and of which scale alpha / r cannot be told; give "
                "FloraStrategy(scale=...), 1.0 for arrays of an earlier FloraStrategy"
            )
        scaled = {module: (b * (self.scale or 1.0), a) for module, (b, a) in pairs.items()}
        fresh = self._how.start == "fresh"
        self._shapes = shapes_of(pairs)
        self._shared, self._frozen = ({}, {} if empty else scaled) if fresh else (scaled, {})
        self._current = arrays

    def _down(self) -> ArrayRecord:
        """What is sent: the arrays of the last round, but for an A that no client would begin with."""
        if self._current is None or not (self._shared or self._frozen):
            return ArrayRecord()
        return self._current

    def _told(self, config: ConfigRecord, server_round: int) -> ConfigRecord:
        """The user's settings, and how the arrays are to be read."""
        columns = [self._shared[m][0].shape[1] if m in self._shared else 0 for m in sorted(self._shapes)]
        return ConfigRecord({
            **config, "lora-rule": self.rule.type, "lora-start": self._how.start, "lora-alike": self._how.alike,
            "lora-trains": self._how.trains(server_round), "lora-scale": self.scale or 1.0, "lora-seed": self.seed,
            "lora-shared-columns": columns if self._down() else [],
        })  # fmt: skip

    def _read(self, record: RoundRecord, replies: Iterable[Message]) -> list[Update]:
        """Replies that have the form of an update; the others, and clients that were silent, in the record alone."""
        found, silent = [], set(self._asked)
        for message in replies:
            node = int(message.metadata.src_node_id)
            silent.discard(node)
            number = client_id(message)
            client = ClientRecord(str(node if number is None else number), 0, bytes_down=self._bytes_down)
            double = number is not None and any(other.id == client.id for other in record.clients)
            record.clients.append(client)
            try:
                if double:
                    raise MessageError(f"another node has replied as {CLIENT} {number}")
                found.append(read_reply(message, client, self._shapes, self.weighted_by_key, self.scale, self.max_rank))
            except MessageError as error:
                client.status, client.reason = "rejected", str(error)
                _log.warning("client %s is refused: %s", client.id, error)
        record.clients += [
            ClientRecord(str(node), 0, reason="no reply in time", bytes_down=self._bytes_down)
            for node in sorted(silent)
        ]
        self._asked = []
        return found

    def _judge(self, updates: list[Update], server_round: int) -> None:
        """Refuse what has the form of an update and cannot be used."""
        fixed = {"b": "A", "a": "B"}.get(self._how.trains(server_round))
        for update in (u for u in updates if u.sound):
            if self._frozen and not update.beside:
                update.refuse(
                    "it did not hold the frozen factors, so that its update is not one of this model; use "
                    "honeloom.flower.receive, or svd, which has none for clients of one rank"
                )
                continue
            update.trace(self._shared, self._how.start, self.seed)
            if fixed is not None:
                update.fix(fixed, self.rule.type)
        if self.rule.type in EQUAL_RANKS:
            refuse_unequal_ranks(updates, self._shared, self.rule.type)
        refuse_outliers(updates, self.outlier)

    def _apply(self, record: RoundRecord, sound: list[Update], shapes: Shapes) -> bool:
        """Combine updates into the new state; False where that cannot be, and nothing changes."""
        total = math.fsum(update.rows for update in sound)
        combined, squares = {}, [0.0, 0.0]
        settings = self.rule.model_dump(exclude={"type"}, exclude_none=True)
        for module in shapes:
            parts = [update.part(module, update.rows / total) for update in sound]
            try:
                combined[module] = self._combine(parts, **settings)
            except (IncompatibleModelsError, RuntimeError) as error:  # the latter: a decomposition that fails
                _log.warning("round %d: nothing changed: module %s: %s", record.round, module, error)
                return False
            norms = error_norms(combined[module], parts, seed=self.seed)
            record.errors[module] = norms.relative
            squares = [squares[0] + norms.difference**2, squares[1] + norms.target**2]
        if not all(bool(torch.isfinite(t).all()) for c in combined.values() for t in whole(c)):
            _log.warning("round %d: nothing changed: the aggregate is not finite", record.round)
            return False
        record.error = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
        self._move(combined)
        self._shapes = shapes
        update = self.update()
        record.rank = max(b.shape[1] for b, _ in update.values())
        self._current = write_factors(update, self.scale or 1.0)
        record.sha256 = _sha256(self._current)
        return True

    def _move(self, combined: Mapping[str, Combined]) -> None:
        """Take the aggregate over as the new state."""
        if self._how.start == "fresh":
            self._frozen = folded(stacked(self._frozen, _plain({m: whole(c) for m, c in combined.items()})))
            return
        self._shared = _plain({module: (c.b, c.a) for module, c in combined.items()})
        residual = _plain({module: c.residual for module, c in combined.items() if c.residual is not None})
        self._frozen = folded(stacked(self._frozen, residual))

    def _metrics(self, record: RoundRecord, sound: list[Update]) -> MetricRecord:
        """The clients' own, averaged, and the round's."""
        contents = common_contents([update.content for update in sound], self.weighted_by_key)
        found = self.train_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None
        ours: dict[str, int | float] = {
            "rank": record.rank,
            "refused": sum(client.status == "rejected" for client in record.clients),
            "bytes-up": sum(client.bytes_up for client in record.clients),
            "bytes-down": sum(client.bytes_down for client in record.clients),
        }
        if record.error is not None:
            ours["relative-error"] = record.error
        return MetricRecord({**dict(found or {}), **ours})


def _settings(rule: Any) -> Any:
    """The settings of a rule that was named, described or given."""
    try:
        return TypeAdapter(AggregationRule).validate_python(rule)
    except ValidationError as error:
        raise ConfigError(f"rule {rule!r}: {error.errors()[0]['msg']}") from None


def _plain(pairs: Pairs) -> dict[str, Pair]:
    return {module: (b.float().contiguous(), a.float().contiguous()) for module, (b, a) in pairs.items()}


def _sha256(arrays: ArrayRecord) -> str:
    """Of names and bytes, in order."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}|{len(array.data)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
