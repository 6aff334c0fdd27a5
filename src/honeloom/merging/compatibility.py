"""Whether models can be combined element by element: same shape, same arithmetic around the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from honeloom.checkpoint.headers import TensorInfo
from honeloom.checkpoint.vocabulary import Vocabulary, read_template
from honeloom.errors import IncompatibleModelsError
from honeloom.merging.merge_config import ACCEPTABLE

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


def check_compatible(
    configs: Mapping[str, Config],
    tensors: Mapping[str, Mapping[str, TensorInfo]],
    *,
    accept: Collection[str] = (),
    by_token: Collection[str] = (),
    by_layer: bool = False,
) -> None:
    """Refuse models whose weights do not mean the same thing.

    Parameters
    ----------
    configs : mapping
        Model's name -> content of its config.json, defaults filled in (as transformers does) so
        that an omitted field and a written default compare equal. The first model is the
        reference.
    tensors : mapping
        Model's name -> its tensors by name.
    accept : collection of str
        Fields that the user lets differ.
    by_token : collection of str
        Tensors with one row per token, which are matched by token and may have other numbers of rows.
    by_layer : bool
        Whether layers are picked one by one, so that their number may differ.

    Raises
    ------
    IncompatibleModelsError
        A model is quantised, or two differ in a field, a tensor's name or shape; the message
        names it and both values.
    """
    names = list(configs)
    passed = {
        *accept,
        *(["vocab_size"] if by_token else []),
        *(["num_hidden_layers", "layer_types"] if by_layer else []),
    }
    for name in names:
        settings = configs[name].get("quantization_config")
        if settings and settings.get("quant_method") != "fp8":  # block-wise fp8 is read as what it stands for
            raise IncompatibleModelsError(
                f"{name} is quantised (quantization_config); codes cannot be averaged. Give its full-precision original"
            )
    first = names[0]
    for other in names[1:]:
        _compare_configs(first, configs[first], other, configs[other], passed)
        if not by_layer:
            _compare_tensors(first, tensors[first], other, tensors[other], by_token)


def _compare_configs(first: str, a: Config, other: str, b: Config, passed: Collection[str]) -> None:
    a, b = _text_part(a), _text_part(b)
    fields: list[tuple[str, Any, Any]] = [(n[0], _first(a, n), _first(b, n)) for n in _PLAIN]
    fields += [(name, find(a), find(b)) for name, find in _DERIVED]
    for field, value, wanted in fields:
        if value != wanted and field not in passed:
            hint = f"; to merge them all the same, set accept: [{field}]" if field in ACCEPTABLE else ""
            raise IncompatibleModelsError(
                f"cannot merge {first} with {other}: {field} is {value!r} and {wanted!r}; "
                f"only models of one architecture and the same settings can be merged{hint}"
            )


def _text_part(config: Config) -> Config:
    """Fields of the language model, wherever a model that sees images keeps them."""
    return {**config, **{k: v for k, v in (config.get("text_config") or {}).items() if k != "model_type"}}


def _first(config: Config, names: tuple[str, ...]) -> Any:
    return next((config[n] for n in names if config.get(n) is not None), None)


def _compare_tensors(
    first: str, a: Mapping[str, TensorInfo], other: str, b: Mapping[str, TensorInfo], by_token: Collection[str]
) -> None:
    for name in [*a, *b]:
        if name not in a or name not in b:
            has, lacks = (first, other) if name in a else (other, first)
            raise IncompatibleModelsError(
                f"cannot merge {first} with {other}: {has} has the tensor {name!r} and {lacks} has not; "
                "were both saved by the same tool, with the same tying of the embeddings?"
            )
        one, two = a[name].shape, b[name].shape
        if one != two and not (name in by_token and one[1:] == two[1:]):
            rows_differ = one[1:] == two[1:]
            hint = "; if these are rows of tokens, set tokenizer: union or tokenizer: base" if rows_differ else ""
            raise IncompatibleModelsError(
                f"cannot merge {first} with {other}: {name!r} has shape {one} and {two}; "
                f"different vocabularies or sizes cannot be averaged{hint}"
            )


def compare_tokenizers(folders: Mapping[str, Path], *, by_token: bool, template_chosen: bool) -> list[str]:
    """Refuse tokenizers and chat templates between which nobody has chosen; say in words what else differs.

    Parameters
    ----------
    folders : mapping
        Model's name -> folder of its tokenizer files, the donor first; a folder without any is passed over.
    by_token : bool
        Whether rows are matched by token, so that vocabularies may differ.
    template_chosen : bool
        Whether the chat template of the result has been chosen.

    Returns
    -------
    list of str
        One warning per difference; empty if all agree.

    Raises
    ------
    IncompatibleModelsError
        Equal ids are different tokens, or chat templates differ, and the configuration does not say what to do.
    """
    found = {name: Vocabulary.read(folder) for name, folder in folders.items()}
    known = {name: vocabulary for name, vocabulary in found.items() if vocabulary is not None}
    if not known:
        return []
    first = next(iter(known))
    words = []
    for name, vocabulary in known.items() if not by_token else ():
        words += _compare_vocabularies(first, known[first], name, vocabulary)
    templates = {name: text for name in known if (text := read_template(folders[name])) is not None}
    if len(set(templates.values())) > 1:
        names = ", ".join(templates)
        what = f"the chat templates of {names} differ, and a model trained on one answers badly in another"
        if not template_chosen:
            raise IncompatibleModelsError(
                f"{what}; choose with chat_template: auto (that of {first}), or the name of a model"
            )
        words.append(what)
    if templates and first not in templates and not template_chosen:
        words.append(
            f"{first} gives the tokenizer and has no chat template, {', '.join(templates)} have; to keep it, set "
            f"chat_template: {next(iter(templates))}"
        )
    return words


def _compare_vocabularies(first: str, one: Vocabulary, name: str, other: Vocabulary) -> list[str]:
    at = {i: token for token, i in one.tokens.items()}
    clash = next(((i, at[i], token) for token, i in other.tokens.items() if at.get(i, token) != token), None)
    if clash is not None:
        raise IncompatibleModelsError(
            f"cannot merge {first} with {name} row by row: token id {clash[0]} is {clash[1]!r} and {clash[2]!r}; "
            "set tokenizer: base or tokenizer: union to merge by tokens"
        )
    if one.digest == other.digest:
        return []
    more = sorted(set(other.tokens) ^ set(one.tokens))
    what = f"{len(more)} tokens are in one of them alone (first {more[0]!r})" if more else "they cut texts differently"
    return [f"the tokenizers of {first} and {name} differ: {what}; the result carries {first}'s"]
