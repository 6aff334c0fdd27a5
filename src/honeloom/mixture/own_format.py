"""config.json of our own formats: `honeloom_mixture` and `honeloom_models`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PROMPT_TOKENS", "mixture_config", "models_config"]

PROMPT_TOKENS = 32
"""Tokens that stand for the prompt of a row that has none."""


def mixture_config(
    trunk: Mapping[str, Any], *, level: str, experts: Sequence[str], top_k: int, dense: int, shared: bool,
    router: Mapping[str, Any], tied: bool, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Content of config.json of a `honeloom_mixture`.

    Parameters
    ----------
    trunk : mapping
        Content of the base's config.json.
    level, experts, top_k, dense, shared
        As in the settings; experts by name.
    router : mapping
        input, type, width, bias.
    tied : bool
        Whether the head is the embeddings.
    dtype : str
        "bfloat16", for example.
    """
    inner = _stock(trunk, dtype)
    text = inner.get("text_config") or inner
    return {
        "architectures": ["HoneloomMixtureForCausalLM"], "model_type": "honeloom_mixture", "trunk": inner,
        "level": level, "experts": list(experts), "top_k": top_k, "dense_layers": dense, "shared_expert": shared,
        "router": _router(router, input=router["input"]),
        **{key: inner.get(key, text.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "vocab_size": text.get("vocab_size"), "tie_word_embeddings": tied, "dtype": dtype,
    }  # fmt: skip


def models_config(
    experts: Sequence[tuple[str, Mapping[str, Any], bool]], encoder: Mapping[str, Any], *, encoder_is: int | None,
    encoder_tokenizer: str | None, router: Mapping[str, Any], layer: int, dtypes: Sequence[str], encoder_dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Content of config.json of `honeloom_models`.

    Parameters
    ----------
    experts : sequence of (str, mapping, bool)
        Name, content of config.json, and whether there is a tokenizer.
    encoder : mapping
        Content of the encoder's config.json, its layers cut.
    encoder_is : int or None
        The expert that is the encoder.
    encoder_tokenizer : str or None
        Its folder.
    router : mapping
        type, width, bias.
    layer : int
        The encoder's last layer, -1 for none.
    dtypes, encoder_dtype
        Names of number types.
    """
    return {
        "architectures": ["HoneloomModelsForCausalLM"],
        "model_type": "honeloom_models",
        "experts": [
            {"name": name, "config": _stock(config, dtype), "tokenizer": f"tokenizers/{name}" if tokens else None}
            for (name, config, tokens), dtype in zip(experts, dtypes, strict=True)
        ],
        "encoder": {"config": _stock(encoder, encoder_dtype), "expert": encoder_is, "tokenizer": encoder_tokenizer},
        "router": _router(router, layer=layer),
        "dtype": encoder_dtype,
    }


def _router(router: Mapping[str, Any], **first: Any) -> dict[str, Any]:
    return {
        **first, "type": router["type"], "width": router["width"], "pooling": "mean", "prompt_tokens": PROMPT_TOKENS,
        "bias": router["bias"],
    }  # fmt: skip


def _stock(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config without what belongs to its folder or to 8-bit weights, and with the type that is written."""
    left = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path", "torch_dtype")}
    return {**left, "dtype": dtype}
