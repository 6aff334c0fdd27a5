"""What a decoder costs: parameters, cache bytes and FLOPs per token, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CacheShape", "cache_shape", "kv_bytes_per_token"]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Layers, key-value heads and head size of a decoder."""

    layers: int
    kv_heads: int
    head_dim: int


def cache_shape(config: Mapping[str, Any]) -> CacheShape:
    """Read the cache's shape from a Hugging Face config; GQA falls back to all heads."""
    text = config.get("text_config") or config
    layers = text.get("num_hidden_layers") or text["n_layer"]
    heads = text.get("num_attention_heads") or text["n_head"]
    hidden = text.get("hidden_size") or text["n_embd"]
    return CacheShape(layers, text.get("num_key_value_heads") or heads, text.get("head_dim") or hidden // heads)


def kv_bytes_per_token(shape: CacheShape, layers_with_attention: int, bytes_per_element: int) -> int:
    """Keys and values of one token in every layer that has attention."""
    return 2 * layers_with_attention * shape.kv_heads * shape.head_dim * bytes_per_element
