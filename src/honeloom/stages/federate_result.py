"""What a federation leaves: an adapter, or a model and the few sums that lead to it from its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from honeloom.backends.devices import release_memory
from honeloom.backends.hf.compare import largest_gap, row_logits
from honeloom.backends.hf.federated_model import FederatedModel
from honeloom.backends.hf.federated_weights import FederatedWeights
from honeloom.backends.hf.load import Loading, load_model
from honeloom.checkpoint.adapter import LoraFile
from honeloom.checkpoint.adapter_writer import combined_config, write_adapter
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.scalars import SeedPool
from honeloom.federated.state import ServerState
from honeloom.ops.lowrank import compress
from honeloom.runs.atomic import write_json
from honeloom.stages.work import Work
from honeloom.types.report import ArtefactKind, Check

__all__ = ["AdapterResult", "WeightsResult", "result_of"]

Pair = tuple[torch.Tensor, torch.Tensor]
POOL = "pool.json"
SAME = 1e-4
"""Largest difference of logits that computing in another order makes."""


def result_of(work: Work[FederateConfig], port: Any) -> AdapterResult | WeightsResult:
    """What the settings train."""
    return AdapterResult(work, port) if isinstance(port, FederatedModel) else WeightsResult(work, port)


class AdapterResult:
    """One adapter that holds the whole update."""

    kind: ArtefactKind = "adapter"
    relation = "adapter"

    def __init__(self, work: Work[FederateConfig], port: FederatedModel) -> None:
        self.work, self.port = work, port
        self._total: dict[str, Pair] = {}

    def read(self) -> None:
        """Take up what an interrupted attempt has written."""
        with LoraFile(self.work.dir) as file:
            self._total = {
                module: (file.weights.read(f.b_name) * f.scale, file.weights.read(f.a_name))
                for module, f in file.factors.items()
            }

    def write(self, state: ServerState) -> None:
        """Write the adapter, with no more columns than a matrix of its shape can have."""
        for module, (b, a) in state.total().items():
            if b.shape[1] > min(self.port.modules[module]):
                b, a = compress(b, a)
            self._total[module] = (b.float().contiguous(), a.float().contiguous())
        found = self.work.inputs["model"]
        base = found.value.partition("@")[0] if found.revision else str(found.published or found.paths[0])
        config = combined_config(
            [{**self.port.adapter_config(), "base_model_name_or_path": base, "revision": found.revision}],
            {module: b.shape[1] for module, (b, _) in self._total.items()}, same=True,
        )  # fmt: skip
        tensors = [
            TensorStream.of(f"base_model.model.{module}.lora_{name}.weight", tensor)
            for module, pair in self._total.items()
            for name, tensor in zip("BA", pair, strict=True)
        ]
        write_adapter(self.work.dir, config, tensors)
        copy_tokenizer(found.paths[0], self.work.dir)

    def verify(self, probes: Sequence[list[int]]) -> list[Check]:
        """Load the saved adapter and compare its logits with those of the model of the clients."""
        expected = row_logits(self.port.hold(self._total), probes)
        del self.port
        release_memory()
        again = load_model(self.work.dir, base=self.work.model(), loading=Loading.of(self.work.config))
        gap = largest_gap(expected, row_logits(again, probes))
        return [Check("the saved adapter gives the clients' logits (largest difference)", gap, SAME, gap <= SAME)]


class WeightsResult:
    """A whole model in float32, and `pool.json`: the seeds' sums, from which anybody who has the base can make it."""

    kind: ArtefactKind = "model"
    relation = "finetune"

    def __init__(self, work: Work[FederateConfig], port: FederatedWeights) -> None:
        self.work, self.port = work, port
        self._pool: Mapping[str, Any] = {}

    def read(self) -> None:
        """Take up what an interrupted attempt has written."""
        self._pool = json.loads((self.work.dir / POOL).read_text())

    def write(self, state: ServerState) -> None:
        """Write the model, and the sums."""
        config, mezo = self.work.config, self.work.config.optimizer
        assert state.pool is not None and mezo.type == "mezo"  # rounds were applied, and the settings saw to it
        self._pool = {
            "seeds": SeedPool(config.pool_size, config.seed).seeds(), "sums": state.pool.tolist(),
            "direction": mezo.direction, "base": self.work.inputs["model"].fingerprint,
        }  # fmt: skip
        self._held().save_pretrained(self.work.dir)
        copy_tokenizer(self.work.inputs["model"].paths[0], self.work.dir)
        write_json(self.work.dir / POOL, dict(self._pool))

    def _held(self) -> Any:
        return self.port.hold(self._pool["seeds"], self._pool["sums"], self._pool["direction"])

    def verify(self, probes: Sequence[list[int]]) -> list[Check]:
        """Load the saved model, compare logits, and make the weights from base and sums once more."""
        model = self._held()
        expected = row_logits(model, probes)
        again = load_model(self.work.dir, loading=Loading(self.work.config.device, "fp32"))
        gap = largest_gap(expected, row_logits(again, probes))
        params, differing = dict(model.named_parameters()), 0
        with Checkpoint.open(self.work.dir) as saved:
            for name in sorted(set(saved.names()) & set(params)):
                differing += int(np.count_nonzero((saved.read(name) != params[name].data.cpu()).numpy()))
        return [
            Check("the saved model gives the clients' logits (largest difference)", gap, SAME, gap <= SAME),
            Check("base and sums lead to the saved weights (weights that differ)", differing, 0, differing == 0),
        ]
