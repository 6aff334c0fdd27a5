"""What a decoder costs: parameters, cache bytes and FLOPs per token, from its config and tensor shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["CacheShape", "cache_shape", "kv_bytes_per_token", "matrix_parameters"]

_POSITIONS = "wpe"
_ONE_EXPERT = re.compile(r"\bexperts\.\d+\.")
_ALL_EXPERTS = re.compile(r"\bexperts\.")


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
