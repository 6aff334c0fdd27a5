"""The model of federated clients that train all weights, by zeroth-order steps: no adapter, no gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.client_rows import ClientRows
from honeloom.backends.hf.federated_steps import measured, zeroth_order_steps
from honeloom.errors import ConfigError
from honeloom.tuning.config import MezoConfig, MezoTuningConfig
from honeloom.tuning.zeroth_order import Kind, accumulated
from honeloom.types.federation import LocalJob, LocalResult
from honeloom.types.rows import Row

__all__ = ["FederatedWeights"]


class FederatedWeights:
    """A LocalPort whose jobs move the base itself; it keeps a copy of the base, from which every job begins.

    Parameters
    ----------
    model : transformers model
        In evaluation mode and float32.
    encoder : Encoder
        For training.
    rows : mapping
        Rows of the clients that this process is.
    batch_size : int
        Rows per forward pass when scoring.

    Raises
    ------
    ConfigError
        The weights are of a type whose rounding swallows the steps.
    """

    def __init__(self, model: Any, encoder: Encoder, rows: Mapping[str, Sequence[Row]], *, batch_size: int) -> None:
        self.model = model.eval()
        self.held = ClientRows(encoder, batch_size)
        for name, mine in rows.items():
            self.held.admit(name, mine)
        self._params = {name: p.data for name, p in sorted(model.named_parameters()) if p.is_floating_point()}
        if odd := sorted({str(t.dtype) for t in self._params.values()} - {"torch.float32"}):
            raise ConfigError(f"method full: steps on {odd[0]} would be lost in rounding; use --dtype fp32")
        self._base = {name: tensor.clone() for name, tensor in self._params.items()}
        self._begun: tuple[tuple[float, ...], dict[str, torch.Tensor]] = ((), {})
        self.modules: Mapping[str, tuple[int, int]] = {name: (t.numel(), 1) for name, t in self._params.items()}

    def rows(self, client: str) -> int:
        """How many rows of a client can be trained on."""
        return len(self.held.of(client))

    def clients(self) -> list[str]:
        """Whose rows are here."""
        return self.held.clients()

    def admit(self, client: str, rows: Sequence[Row]) -> None:
        """Take in a client's rows."""
        self.held.admit(client, rows)

    def train(self, job: LocalJob) -> LocalResult:
        """Move the base to where the round begins, and take the steps from there."""
        mezo = MezoConfig(**job.settings["optimizer"])
        with one_thread(self.model.device):
            self.hold(*job.moved, mezo.direction)
            digest = self._digest()
            with self.held.told(self.model, job) as metrics:
                scalars, metrics["loss_train"] = zeroth_order_steps(
                    self.model, self.held, job, self._params, mezo, sides=None
                )
        return LocalResult({}, metrics, scalars, digest)

    def measure(self, job: LocalJob) -> dict[str, float]:
        """What the loss of the client's rows bears at the base."""
        mezo = MezoTuningConfig(**job.settings["optimizer"])
        with one_thread(self.model.device):
            return measured(self.hold([], [], mezo.direction), self.held, job, self._params, mezo)

    @torch.no_grad()
    def hold(self, seeds: Sequence[int], sums: Sequence[float], kind: Kind) -> Any:
        """The model with the base moved along some seeds; the next job changes it.

        All clients of a round begin alike, so a process that is several of them keeps where that is.
        """
        begun = dict(self._begun[1]) if self._begun[0] == tuple(sums) else {}
        for name, tensor in self._params.items():
            tensor.copy_(begun.get(name, self._base[name]))
            if any(sums) and name not in begun:
                tensor.add_(accumulated(tensor, name, seeds, sums, kind))
        if any(sums) and not begun and len(self.held.clients()) > 1:
            self._begun = (tuple(sums), {name: tensor.clone() for name, tensor in self._params.items()})
        return self.model

    def _digest(self) -> str:
        found = hashlib.sha256()
        for name, tensor in self._params.items():
            found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]
