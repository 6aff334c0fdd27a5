"""Costs of a drop: of the source, of every unit, and of what is written, from headers and configs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honeloom.backends.hf.load import load_config
from honeloom.checkpoint.dtypes import torch_dtype
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.cost import Cost, Prices, cache_layers, decode_speedup, expert_counts
from honeloom.dropping.export import ExportPlan, Source
from honeloom.dropping.scores import Unit
from honeloom.types.plans import DropPlan

__all__ = ["Costs", "unit_costs"]

CONTEXTS = ((1, 0), (1, 8192), (1, 32768), (32, 8192))
"""Batches and contexts for which the bound of decoding is told."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Prices of a model, and what its source and units cost.

    Attributes
    ----------
    prices : Prices
        How things are counted.
    shapes : mapping
        Tensors of the source's files.
    attentions : tuple of int
        Layers that have one.
    units : mapping
        Unit -> what it costs.
    """

    prices: Prices
    shapes: Mapping[str, tuple[int, ...]]
    attentions: tuple[int, ...]
    units: Mapping[Unit, Cost]

    @classmethod
    def of(cls, checkpoint: Checkpoint, source: Source, folder: Path) -> Costs:
        """Read headers and config of a model."""
        config = load_config(folder).get_text_config().to_dict()
        infos = [checkpoint.info(name) for name in checkpoint.names()]
        experts, active = expert_counts(config)
        layout = source.layout
        embedding = layout.listed.embeddings if layout.listed else "embed_tokens"
        shapes = {info.name: info.shape for info in infos}
        head = layout.listed.disk_head if layout.listed else "lm_head"
        prices = Prices(
            cache=cache_layers(config),
            embedding=embedding.rsplit(".", 1)[-1],
            tied=f"{head}.weight" not in shapes,
            experts=experts,
            active=active,
            itemsize=torch_dtype(infos[0].dtype).itemsize,
        )
        missing = {layer for half, layer in source.absent if half == "attention"}
        attentions = tuple(i for i in range(source.layers) if i not in missing)
        return cls(prices, shapes, attentions, prices.units(shapes, layout.half_of, missing))

    @property
    def before(self) -> Cost:
        """Of the source."""
        return self.prices.cost(self.shapes, self.attentions)

    def after(self, export: ExportPlan) -> Cost:
        """Of what an export writes, the zeros included that it puts in the place of what is missing."""
        cost = self.prices.cost(self._written(export), self._attending(export))
        return cost + Cost(0, self._stand_in(export), 0)

    def bounds(self, export: ExportPlan) -> list[dict[str, Any]]:
        """The most by which decoding can become faster, where reading memory is the limit."""
        size, written, attending = self.prices.itemsize, self._written(export), self._attending(export)
        found = []
        for batch, context in CONTEXTS:
            caches = [self.prices.cache_bytes(layers, context, batch) for layers in (self.attentions, attending)]
            matrices = [self.prices.matrices(tensors) * size for tensors in (self.shapes, written)]
            speedup = decode_speedup((matrices[0], caches[0]), (matrices[1], caches[1]))
            found.append({
                "batch": batch, "context": context, "speedup": round(speedup, 4),
                "cache_bytes": {"before": caches[0], "after": caches[1]},
            })  # fmt: skip
        return found

    def without(self, drops: Sequence[Unit]) -> Cost:
        """Of the source after some drops, however it would have to be written."""
        saved = [self.units[Unit(u.kind, i)] for u in drops for i in range(u.layer, u.layer + u.blocks)]
        cost = self.before
        for one in saved:
            cost += Cost(-one.params, -one.kv_bytes_per_token, -one.flops_per_token)
        return cost

    @staticmethod
    def _written(export: ExportPlan) -> dict[str, tuple[int, ...]]:
        """Tensors of an export by their names in the source, which say what they are."""
        return {t.source or t.name: t.shape for t in export.tensors}

    @staticmethod
    def _attending(export: ExportPlan) -> list[int]:
        return [attention for attention, _ in export.blocks if attention is not None]

    def _stand_in(self, export: ExportPlan) -> int:
        """Cache of the one head of zeros that llama.cpp needs where the first block has no attention."""
        if export.profile != "gguf" or export.blocks[0][0] is not None:
            return 0
        width = next(t.shape[0] for t in export.tensors if t.name == "blk.0.attn_k.weight")
        return 2 * width * self.prices.itemsize


def unit_costs(folder: Path) -> tuple[Mapping[Unit, Cost], Cost]:
    """What every unit of a model and the whole of it cost, from its headers; a family must be listed."""
    with Checkpoint.open(folder) as checkpoint:
        source = Source.of(checkpoint, DropPlan((), (), (), "", "zero"))
        costs = Costs.of(checkpoint, source, folder)
    return costs.units, costs.before
