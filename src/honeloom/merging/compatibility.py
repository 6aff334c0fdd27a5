"""Whether models can be combined element by element: same shape, same arithmetic around the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from honeloom.checkpoint.headers import TensorInfo
from honeloom.errors import CheckpointError, IncompatibleModelsError

__all__ = ["check_compatible", "compare_tokenizers"]

Config = Mapping[str, Any]

_PLAIN: tuple[tuple[str, ...], ...] = (
    ("model_type",),
    ("hidden_size", "n_embd"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("intermediate_size", "n_inner"),
    ("vocab_size",),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    ("hidden_act", "hidden_activation", "activation_function"),
    ("tie_word_embeddings",),
    ("attention_bias",),
    ("mlp_bias",),
    ("sliding_window",),
    ("layer_types",),
    ("attn_logit_softcapping",),
    ("final_logit_softcapping",),
    ("query_pre_attn_scalar",),
    ("use_parallel_residual",),
    ("num_local_experts", "num_experts"),
    ("num_experts_per_tok",),
    ("norm_topk_prob",),
)
"""Fields that must agree, each with the names it goes by."""


def _key_value_heads(config: Config) -> Any:
    return config.get("num_key_value_heads") or _first(config, ("num_attention_heads", "n_head"))


def _head_dim(config: Config) -> Any:
    hidden, heads = _first(config, ("hidden_size", "n_embd")), _first(config, ("num_attention_heads", "n_head"))
    return config.get("head_dim") or (hidden // heads if hidden and heads else None)


def _rope(config: Config) -> Any:
    """Rotary settings in one form, whether written by transformers 4 or 5."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    theta = _first(config, ("rope_theta", "rotary_emb_base"))
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    return {key: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for key, v in rope.items()}


_DERIVED: tuple[tuple[str, Callable[[Config], Any]], ...] = (
    ("num_key_value_heads", _key_value_heads),
    ("head_dim", _head_dim),
    ("rope_parameters", _rope),
)


def check_compatible(configs: Mapping[str, Config], tensors: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Refuse models whose weights do not mean the same thing.

    Parameters
    ----------
    configs : mapping
        Model's name -> content of its config.json, defaults filled in (as transformers does) so
        that an omitted field and a written default compare equal. The first model is the
        reference.
    tensors : mapping
        Model's name -> its tensors by name.

    Raises
    ------
    IncompatibleModelsError
        A model is quantised, or two differ in a field, a tensor's name or shape; the message
        names it and both values.
    """
    names = list(configs)
    for name in names:
        if configs[name].get("quantization_config"):
            raise IncompatibleModelsError(
                f"{name} is quantised (quantization_config); codes cannot be averaged. Give its full-precision original"
            )
    first = names[0]
    for other in names[1:]:
        _compare_configs(first, configs[first], other, configs[other])
        _compare_tensors(first, tensors[first], other, tensors[other])


def _compare_configs(first: str, a: Config, other: str, b: Config) -> None:
    a, b = _text_part(a), _text_part(b)
    fields: list[tuple[str, Any, Any]] = [(n[0], _first(a, n), _first(b, n)) for n in _PLAIN]
    fields += [(name, find(a), find(b)) for name, find in _DERIVED]
    for field, value, wanted in fields:
        if value != wanted:
            raise IncompatibleModelsError(
                f"cannot merge {first} with {other}: {field} is {value!r} and {wanted!r}; "
                "only models of one architecture and the same settings can be merged"
            )


def _text_part(config: Config) -> Config:
    """Fields of the language model, wherever a model that sees images keeps them."""
    return {**config, **{k: v for k, v in (config.get("text_config") or {}).items() if k != "model_type"}}


def _first(config: Config, names: tuple[str, ...]) -> Any:
    return next((config[n] for n in names if config.get(n) is not None), None)


def _compare_tensors(first: str, a: Mapping[str, TensorInfo], other: str, b: Mapping[str, TensorInfo]) -> None:
    for name in [*a, *b]:
        if name not in a or name not in b:
            has, lacks = (first, other) if name in a else (other, first)
            raise IncompatibleModelsError(
                f"cannot merge {first} with {other}: {has} has the tensor {name!r} and {lacks} has not; "
                "were both saved by the same tool, with the same tying of the embeddings?"
            )
        if a[name].shape != b[name].shape:
            raise IncompatibleModelsError(
                f"cannot merge {first} with {other}: {name!r} has shape {a[name].shape} and {b[name].shape}; "
                "different vocabularies or sizes cannot be averaged"
            )


def compare_tokenizers(folders: Mapping[str, Path]) -> list[str]:
    """Say in words where tokenizers or chat templates differ from the first model's.

    Parameters
    ----------
    folders : mapping
        Model's name -> folder of its tokenizer files; a folder without any is passed over.

    Returns
    -------
    list of str
        One warning per difference; empty if all agree.
    """
    parts = {name: _tokenizer_parts(folder) for name, folder in folders.items()}
    known = {name: part for name, part in parts.items() if part}
    if not known:
        return []
    first = next(iter(known))
    return [
        f"{first} and {name} have different {what}; the result carries {first}'s. "
        "Equal token ids should mean equal text, or the merged rows mix different words"
        for name, part in known.items()
        for what in ("tokenizers", "chat templates")
        if part.get(what) != known[first].get(what)
    ]


def _tokenizer_parts(folder: Path) -> dict[str, str]:
    """Content hashes of the vocabulary and of the chat template."""
    parts = {}
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        if (folder / name).is_file():
            parts["tokenizers"] = _digest((folder / name).read_bytes())
            break
    template = _chat_template(folder)
    if template is not None:
        parts["chat templates"] = _digest(template.encode())
    return parts


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                template = json.loads((folder / name).read_bytes()).get("chat_template")
            except (ValueError, AttributeError):
                raise CheckpointError(f"{folder / name}: not a JSON object; download the folder again") from None
            if template is not None:
                return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
