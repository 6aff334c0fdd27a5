"""Key-value caches of mixtures: every expert keeps the keys and values of its own rows, and rows keep their experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import CacheLayerMixin

from honeloom.backends.hf.mixture_gates import Decision

__all__ = ["MixtureCache", "ModelsCache", "OwnCacheGeneration", "take_rows"]


def take_rows(decision: Decision, source: torch.Tensor, count: int) -> tuple[Decision, dict[int, torch.Tensor]]:
    """The decision of a batch whose row b is row `source[b]` of the old one, as beam search makes them.

    Returns
    -------
    Decision, dict
        The new decision, and for every expert that had rows the places of its new rows among its
        old ones.
    """
    moved = Decision.of_experts(decision.experts[source], decision.weights[source], count)
    places = {}
    for expert, rows in decision.groups:
        places[expert] = torch.searchsorted(rows, source[moved.rows_of(expert)])
    return moved, places


def _places(indices: Any, size: int, device: torch.device) -> torch.Tensor:
    """Row numbers, of numbers or of a mask."""
    found = torch.as_tensor(indices, device=device)
    return torch.arange(size, device=device)[found]


class RoutedLayer(CacheLayerMixin):
    """One routed decoder layer: a stock cache layer per expert, each holding its expert's rows alone.

    Experts write through their own views of the cache (`MixtureCache.views`), never here.
    """

    def __init__(self, stock: Any, experts: int) -> None:
        super().__init__()
        self.experts = [copy.deepcopy(stock) for _ in range(experts)]
        self.is_sliding = getattr(stock, "is_sliding", False)
        self.is_croppable = getattr(stock, "is_croppable", True)

    @property
    def _live(self) -> Any:
        """A layer that has rows: all that have any are equally long."""
        filled = (layer for layer in self.experts if layer.is_initialized and layer.keys.numel())
        return next(filled, self.experts[0])

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refused, as `update` is."""
        raise ValueError("a routed layer is written to by its experts, through the views of its MixtureCache")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refused: which expert writes is not known here."""
        raise ValueError("a routed layer is written to by its experts, through the views of its MixtureCache")

    def get_seq_length(self) -> int:
        """Tokens of every row, however the rows are spread."""
        return int(self._live.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new tokens will see."""
        sizes: tuple[int, int] = self._live.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        """Most tokens that the layer keeps; -1 if there is no limit."""
        return int(self.experts[0].get_max_length())

    def take(self, places: Mapping[int, torch.Tensor]) -> None:
        """Keep of every expert's rows those at the given places."""
        for expert, layer in enumerate(self.experts):
            if layer.is_initialized and expert in places:
                layer.batch_select_indices(places[expert].to(layer.keys.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every row."""
        for layer in self.experts:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.experts:
            layer.reset()

    def offload(self) -> None:
        """Move keys and values to the host."""
        for layer in self.experts:
            layer.offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        for layer in self.experts:
            layer.prefetch()


class _DecidedCache(Cache):
    """A cache that keeps the decisions taken at its first forward pass."""

    def __init__(self, layers: list[Any], experts: int) -> None:
        super().__init__(layers=layers)
        self.count = experts
        self.decisions: dict[int, Decision] = {}

    def _take(self, source: torch.Tensor) -> None:
        raise NotImplementedError

    def _rows(self) -> torch.Tensor:
        """Numbers of the rows, on the decisions' device."""
        held = next(iter(self.decisions.values())).experts
        return torch.arange(len(held), device=held.device)

    def reset(self) -> None:
        """Forget all tokens and decisions."""
        super().reset()
        self.decisions.clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row b go on from row `beam_idx[b]`, its experts included."""
        if self.decisions:
            self._take(beam_idx.to(self._rows().device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.decisions:
            self._take(self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows."""
        if self.decisions:
            rows = self._rows()
            self._take(_places(indices, len(rows), rows.device))


class MixtureCache(_DecidedCache):
    """The cache of a mixture with a shared trunk.

    Parameters
    ----------
    trunk : PreTrainedConfig
        Of the trunk; says which layers slide.
    experts : int
        How many there are.
    routed : range
        Layers whose attention is routed: none where only MLPs are.
    shared : int or None
        The layer whose decision holds for all routed layers; None if each has its own.
    """

    def __init__(self, trunk: Any, experts: int, routed: Sequence[int], shared: int | None = None) -> None:
        layers = list(DynamicCache(config=trunk).layers)
        for i in routed:
            layers[i] = RoutedLayer(layers[i], experts)
        super().__init__(layers, experts)
        self.shared = shared
        self.views = [
            Cache(layers=[layer.experts[e] if isinstance(layer, RoutedLayer) else layer for layer in layers])
            for e in range(experts)
        ]
        """Expert -> the cache as this expert sees it: its own rows in routed layers."""

    def _take(self, source: torch.Tensor) -> None:
        moved, places = {}, {}
        for index, decision in self.decisions.items():
            moved[index], places[index] = take_rows(decision, source, self.count)
        layers: list[Any] = self.layers
        for index, layer in enumerate(layers):
            if not isinstance(layer, RoutedLayer):
                layer.batch_select_indices(source)
            else:
                layer.take(places[index if self.shared is None else self.shared])
        self.decisions = moved


class ModelsCache(_DecidedCache):
    """The cache of a mixture of whole models: a stock cache per model, with this model's rows."""

    def __init__(self, experts: int) -> None:
        super().__init__([], experts)
        self.experts: list[Any] = [None] * experts
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of every row."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that new tokens will see."""
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit of its own."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every row."""
        for held in self.experts:
            if held is not None:
                held.crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens and decisions."""
        super().reset()
        self.experts, self.seen = [None] * self.count, 0

    def _take(self, source: torch.Tensor) -> None:
        decision, places = take_rows(self.decisions[0], source, self.count)
        for expert, picked in places.items():
            self.experts[expert].batch_select_indices(picked)
        self.decisions[0] = decision


class OwnCacheGeneration(GenerationMixin):
    """Generation by models whose decisions are kept with their keys and values."""

    def new_cache(self) -> Any:
        """An empty cache; None where a stock one will do."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        own = self.new_cache()
        if own is None or generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            prepare = GenerationMixin._prepare_cache_for_generation
            return prepare(cast(Any, self), generation_config, model_kwargs, *rest, **named)
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation {kind!r}: a mixture that routes rows has its own cache alone")
        model_kwargs["past_key_values"] = own
        return None
