"""What a decoder costs: parameters, cache bytes and FLOPs per token, from its config and tensor shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from honeloom.dropping.scores import Unit

__all__ = ["CacheLayer", "Cost", "Prices", "cache_layers", "decode_speedup", "expert_counts", "matrix_parameters"]

_POSITIONS = "wpe"
_ONE_EXPERT = re.compile(r"\bexperts\.\d+\.")
_ALL_EXPERTS = re.compile(r"\bexperts\.")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk")


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What a layer keeps of every token.

    Attributes
    ----------
    elements : int
        Numbers of keys and values together; 0 where the layer has a state of fixed size.
    window : int or None
        Tokens that it keeps at most.
    """

    elements: int
    window: int | None = None


def cache_layers(config: Mapping[str, Any]) -> tuple[CacheLayer, ...]:
    """Read from a Hugging Face config what every layer's cache keeps; GQA falls back to all heads.

    Parameters
    ----------
    config : mapping
        Of the loaded model, in which transformers has filled what older files leave out; a text part counts.
    """
    text = config.get("text_config") or config
    layers = text.get("num_hidden_layers") or text["n_layer"]
    kinds = text.get("layer_types") or [None] * layers
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    chunk = text.get("attention_chunk_size")
    found = []
    for layer, kind in enumerate(kinds):
        elements = 0 if kind is not None and ("attention" not in kind or kind.startswith("linear")) else 1
        kept = {None: window, "sliding_attention": text.get("sliding_window"), "chunked_attention": chunk}.get(kind)
        found.append(CacheLayer(elements * _elements(text, layer), kept or None))
    return tuple(found)


def _elements(text: Mapping[str, Any], layer: int) -> int:
    """Keys and values of one token in a layer."""
    heads = text.get("num_attention_heads") or text["n_head"]
    if text.get("kv_lora_rank"):  # every head's keys are made of latent ones before they are kept
        keys = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
        return int(heads * (keys + text["v_head_dim"]))
    hidden = text.get("hidden_size") or text["n_embd"]
    by_layer = text.get("num_key_value_heads_per_layer")
    if by_layer:
        kv_heads = by_layer[layer]
    elif text.get("multi_query") and not text.get("new_decoder_architecture"):
        kv_heads = 1
    else:
        kv_heads = text.get("num_key_value_heads") or text.get("num_kv_heads") or heads
    return int(2 * kv_heads * (text.get("head_dim") or hidden // heads))


def expert_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token uses; (1, 1) without experts."""
    text = config.get("text_config") or config
    experts = next((int(text[key]) for key in _EXPERTS if text.get(key)), 1)
    return experts, min(experts, next((int(text[key]) for key in _ACTIVE if text.get(key)), 1))


def matrix_parameters(
    shapes: Mapping[str, Sequence[int]], *, embedding: str, tied: bool, experts: int = 1, active: int = 1
) -> float:
    """Parameters that one token is multiplied with; FLOPs per token are twice as many.

    Parameters
    ----------
    shapes : mapping
        Tensor name -> shape.
    embedding : str
        Module name of the token embedding ("embed_tokens"): looked up, not multiplied, but
        counted once where it is tied and serves as the head. Learned positions never count.
    tied : bool
        Whether the head is the embedding.
    experts, active : int
        Experts per layer and how many of them a token uses.
    """
    total = 0.0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if module == _POSITIONS or (module == embedding and not tied):
            continue
        if len(shape) == 2 or (len(shape) == 3 and _ALL_EXPERTS.search(name)):
            routed = bool(_ONE_EXPERT.search(name)) or len(shape) == 3
            total += prod(shape) * (active / experts if routed else 1.0)
    return total


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters, cache bytes that a token adds, and FLOPs that a token takes in matrices."""

    params: int
    kv_bytes_per_token: int
    flops_per_token: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.kv_bytes_per_token + other.kv_bytes_per_token,
            self.flops_per_token + other.flops_per_token,
        )

    def of(self, key: str) -> int:
        """One of the three by its name."""
        return {
            "params": self.params,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "flops_per_token": self.flops_per_token,
        }[key]


@dataclass(frozen=True, slots=True)
class Prices:
    """How tensors and attentions of one decoder are counted.

    Attributes
    ----------
    cache : tuple of CacheLayer
        From `cache_layers`.
    embedding : str
        Module name of the token embedding.
    tied : bool
        Whether the head is the embedding.
    experts, active : int
        From `expert_counts`.
    itemsize : int
        Bytes of a number, of weights and cache alike.
    """

    cache: tuple[CacheLayer, ...]
    embedding: str
    tied: bool
    experts: int
    active: int
    itemsize: int

    def matrices(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Parameters that one token is multiplied with."""
        return matrix_parameters(
            shapes, embedding=self.embedding, tied=self.tied, experts=self.experts, active=self.active
        )

    def cost(self, shapes: Mapping[str, Sequence[int]], attentions: Iterable[int]) -> Cost:
        """Of tensors, and the caches of the layers that keep their attention.

        The cache is that of a token within every sliding window; scores of attention are left out of the FLOPs.
        """
        cache = sum(self.cache[layer].elements for layer in attentions) * self.itemsize
        return Cost(sum(prod(shape) for shape in shapes.values()), cache, round(2 * self.matrices(shapes)))

    def cache_bytes(self, attentions: Iterable[int], context: int, batch: int = 1) -> int:
        """Of whole caches with so many tokens: no layer keeps more than its window."""
        kept = (self.cache[layer] for layer in attentions)
        return sum(c.elements * min(context, c.window or context) for c in kept) * self.itemsize * batch

    def units(
        self,
        shapes: Mapping[str, Sequence[int]],
        half_of: Callable[[str], tuple[Any, ...] | None],
        without_attention: Collection[int] = (),
    ) -> dict[Unit, Cost]:
        """What each attention and MLP costs, norms included, and each block.

        Parameters
        ----------
        half_of : callable
            Tensor name -> (layer, "attention" or "mlp" or None, ...); None for a tensor of no layer.
        without_attention : collection of int
            Layers that have none.
        """
        parts: dict[Unit, dict[str, Sequence[int]]] = {}
        for name, shape in shapes.items():
            place = half_of(name)
            if place is not None and place[1] in ("attention", "mlp"):
                unit = Unit("attention" if place[1] == "attention" else "mlp", place[0])
                parts.setdefault(unit, {})[name] = shape
        found: dict[Unit, Cost] = {}
        for unit, tensors in parts.items():
            attends = unit.kind == "attention" and unit.layer not in without_attention
            found[unit] = self.cost(tensors, [unit.layer] if attends else [])
        for layer in sorted({unit.layer for unit in parts}):
            halves = [found[u] for u in (Unit("attention", layer), Unit("mlp", layer)) if u in found]
            found[Unit("block", layer)] = sum(halves[1:], start=halves[0])
        return found


def decode_speedup(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The most by which decoding can become faster where memory is the limit: bytes that a step reads.

    Parameters
    ----------
    before, after : (float, float)
        Bytes of the matrices, which a batch reads once, and of all its caches.
    """
    return sum(before) / sum(after)
