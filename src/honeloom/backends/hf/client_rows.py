"""Rows of federated clients in one process: encoded, in the order of a round, and those on which losses are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from honeloom.backends.hf.chat import Encoded, Encoder
from honeloom.backends.hf.score import Scorer
from honeloom.backends.hf.utility import trainable
from honeloom.errors import RowsError
from honeloom.ops.noise import keyed_uniform, permutation
from honeloom.types.federation import LocalJob
from honeloom.types.rows import Row

__all__ = ["ClientRows"]

MEASURED = 16
"""Rows of a client on which its loss is measured before and after."""


class ClientRows:
    """Rows by client.

    Parameters
    ----------
    encoder : Encoder
        For training.
    batch_size : int
        Rows per forward pass when scoring.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self.encoder = encoder
        self.batch_size = batch_size
        self._encoded: dict[str, list[Encoded]] = {}
        self._measured: dict[str, list[Row]] = {}

    def admit(self, client: str, rows: Sequence[Row]) -> None:
        """Take in a client's rows.

        Raises
        ------
        RowsError
            None of them has a trainable token.
        """
        found = [e for row in rows if (e := trainable(self.encoder, row)) is not None]
        if not found:
            raise RowsError(f"client {client!r}: none of its {len(rows)} rows has a trainable token; give others")
        self._encoded[client] = found
        draws = keyed_uniform(0, "federated/measured", [row.id for row in rows])
        self._measured[client] = [rows[i] for i in draws.argsort(kind="stable")[:MEASURED]]

    def clients(self) -> list[str]:
        """Whose rows are here."""
        return list(self._encoded)

    def of(self, client: str) -> list[Encoded]:
        """A client's rows that can be trained on."""
        return self._encoded[client]

    def batches(self, job: LocalJob) -> Iterator[list[list[Encoded]]]:
        """A pass over the rows in a drawn order, and further ones, until there are steps enough."""
        mine = self._encoded[job.client]
        size, wanted = int(job.settings["batch_size"]), int(job.settings["steps"]) * int(job.settings["batch_size"])
        order: list[int] = []
        while len(order) < wanted:
            name = f"federated/order/{job.order}/{len(order) // len(mine)}"
            order += permutation(job.seed, name, len(mine)).tolist()
        for start in range(0, wanted, size):
            yield [[mine[i] for i in order[start : start + size]]]

    @contextmanager
    def told(self, model: Any, job: LocalJob) -> Iterator[dict[str, float]]:
        """What a client tells of its losses, before and after what is done inside; nothing, where noise hides rows."""
        metrics: dict[str, float] = {}
        if job.settings.get("dp"):
            yield metrics
            metrics.clear()
            return
        metrics["loss_before"] = self.loss(model, job.client)
        yield metrics
        if job.settings["optimizer"].get("objective", "loss") != "loss":  # what was trained on is no loss
            metrics.pop("loss_train", None)
        metrics["loss_after"] = self.loss(model, job.client)

    def loss(self, model: Any, client: str) -> float:
        """Nats per token on some of the client's rows."""
        losses = [loss for _, loss in Scorer(model, self.encoder, self.batch_size).losses(self._measured[client])]
        return sum(x.loss_sum for x in losses) / max(1, sum(x.tokens for x in losses))
