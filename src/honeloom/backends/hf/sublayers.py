"""Attention and MLP of every decoder layer: where they are, proof that they can go, and their removal.

Families are found by the table of layouts, others by the modules' usual names. Names prove nothing, so
every layer is tried: with both halves silenced it must return its input to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from honeloom.backends.hf.dropped_model import NoAttention, NoMlp
from honeloom.backends.hf.sublayer_map import (
    HALVES,
    Half,
    Sublayers,
    evaluating,
    inner_model,
    layer_list,
    put_back,
    swap,
)
from honeloom.backends.hf.sublayer_probe import Probe
from honeloom.checkpoint.architectures import ARCHITECTURES, Architecture, architecture_of
from honeloom.errors import CheckpointError

__all__ = ["Sublayers", "layer_list", "locate", "silence", "silenced"]

ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")
MLP_NAMES = (("mlp",), ("ffn",), ("feed_forward",), ("block_sparse_moe",), ("moe",), ("fc1", "fc2"))


def locate(model: Any, architecture: Architecture | None = None) -> Sublayers:
    """Find the halves of every layer, and try whether they can be dropped.

    The probe runs every layer on random numbers a few times, with 8 tokens.

    Parameters
    ----------
    model : transformers model
        With or without adapters; halves that a dropped model lacks already are noticed.
    architecture : Architecture, optional
        Layout to go by; by default that of the model's type, or whatever the modules' names say.

    Raises
    ------
    CheckpointError
        Attention and MLP are not found, or they do more than add to the residual stream: the message says by how
        much a layer without both changes its input.
    """
    inner = inner_model(model)
    where = _by_table(inner, architecture) or _by_names(inner)
    layers = inner.get_submodule(where.layers)
    absent = {half: tuple(i for i, layer in enumerate(layers) if _is_absent(layer, where.of(half))) for half in HALVES}
    where = replace(where, without_attention=absent["attention"], without_mlp=absent["mlp"])
    with evaluating(model), torch.inference_mode():
        return Probe(inner, where).run()


def _is_absent(layer: nn.Module, paths: Sequence[str]) -> bool:
    return isinstance(layer.get_submodule(paths[0]), NoAttention | NoMlp)


def _by_table(inner: Any, architecture: Architecture | None) -> Sublayers | None:
    """The halves by the table of layouts; None if the family is not listed."""
    config = inner.config.to_dict()
    if architecture is None:
        if config.get("model_type") not in ARCHITECTURES:
            return None
        architecture = architecture_of(config)
    try:
        layers = inner.get_submodule(architecture.layers)
        for layer in layers:
            layer.get_submodule(architecture.attention), layer.get_submodule(architecture.mlp)
    except AttributeError as error:
        raise CheckpointError(
            f"{type(inner).__name__}: {error}, so it does not have the layout of {architecture.model_type}"
        ) from None
    return Sublayers(architecture.layers, (architecture.attention,), (architecture.mlp,))


def _by_names(inner: Any) -> Sublayers:
    """The halves by the usual names of modules."""
    if inner.config.is_encoder_decoder:
        raise CheckpointError(f"{type(inner).__name__} is an encoder-decoder; layers of decoders alone can be dropped")
    count = inner.config.get_text_config().num_hidden_layers
    decoder = inner.get_decoder()
    found = [
        (module, attention, mlp)
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
        for attention in [next((n for n in ATTENTION_NAMES if _all_have(module, (n,))), None)]
        for mlp in [next((names for names in MLP_NAMES if _all_have(module, names)), None)]
        if attention and mlp
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"{type(inner).__name__}: {len(found) or 'no'} lists of {count} layers that all have an attention "
            f"({', '.join(ATTENTION_NAMES)}) and an MLP ({', '.join('+'.join(n) for n in MLP_NAMES)}), and one is "
            "needed to know what to drop"
        )
    layers, attention, mlp = found[0]
    path = next(name for name, module in inner.named_modules() if module is layers)
    return Sublayers(path, (attention,), mlp)


def _all_have(layers: nn.ModuleList, names: Sequence[str]) -> bool:
    return all(isinstance(getattr(layer, name, None), nn.Module) for layer in layers for name in names)


def silence(
    model: Any, *, attention: Sequence[int] = (), mlp: Sequence[int] = (), where: Sublayers | None = None
) -> Sublayers:
    """Take attentions and MLPs out of a loaded model for good, with the norms that only they read.

    Their parameters go, the layers' numbers stay, and caches made from the model's config keep no place for
    layers without attention. A cache made without the config (`DynamicCache()`) does not know of them.

    Parameters
    ----------
    attention, mlp : sequence of int
        Layers of the loaded model; what is gone already may be named again.
    where : Sublayers, optional
        From `locate`, which is called if it is not given.

    Returns
    -------
    Sublayers
        As `where`, with what is missing now.

    Raises
    ------
    CheckpointError
        A layer is not there, no attention would be left, or the cache of the family cannot be told.
    """
    return _remove(model, where or locate(model), attention, mlp)[0]


@contextmanager
def silenced(
    model: Any, *, attention: Sequence[int] = (), mlp: Sequence[int] = (), where: Sublayers | None = None
) -> Iterator[Sublayers]:
    """As `silence`, for as long as the context lasts; then the model is as before."""
    after, undo = _remove(model, where or locate(model), attention, mlp)
    try:
        yield after
    finally:
        for step in reversed(undo):
            step()


def _remove(
    model: Any, where: Sublayers, attention: Sequence[int], mlp: Sequence[int]
) -> tuple[Sublayers, list[Callable[[], None]]]:
    odd = [i for i in (*attention, *mlp) if not 0 <= i < where.count]
    if odd:
        raise CheckpointError(f"layer {odd[0]} is to lose a half, and the model has layers 0 to {where.count - 1}")
    after = replace(
        where,
        without_attention=tuple(sorted({*where.without_attention, *attention})),
        without_mlp=tuple(sorted({*where.without_mlp, *mlp})),
    )
    if len(after.without_attention) == where.count:
        raise CheckpointError(
            f"all {where.count} attentions would be gone, and at least 1 must remain: without one tokens never see "
            "each other"
        )
    layers, undo = layer_list(model, where), []
    restore = _fit_cache(inner_model(model), layers, after)
    given: tuple[tuple[Half, Sequence[int]], ...] = (("attention", attention), ("mlp", mlp))
    for half, dropped in given:
        for i in dropped:
            undo += swap(layers[i], where, i, half, norms=i not in where.without(half))
    return after, [restore, lambda: put_back(undo)]


def _fit_cache(inner: Any, layers: Sequence[Any], after: Sublayers) -> Callable[[], None]:
    """Let caches know which layers have no attention: they read the length off the first that has.

    transformers keeps a placeholder where `kv_sharing_modes` says that a layer reuses another's keys. Where it does
    not, attentions of one kind take consecutive places in the cache.

    Returns
    -------
    callable
        Undoes it.
    """
    config, missing = inner.config.get_text_config(), after.without_attention
    if not missing:
        return lambda: None
    before = vars(config).get("kv_sharing_modes")
    modes = ["reuse" if i in missing else "full" for i in range(after.count)]
    if not hasattr(type(config), "kv_sharing_modes"):
        config.kv_sharing_modes = modes
        if keeps_placeholders(config, missing):
            return lambda: _set_modes(config, before)
        _set_modes(config, before)
    return _compact(config, layers, after)


def _set_modes(config: Any, modes: Any) -> None:
    if modes is None:
        vars(config).pop("kv_sharing_modes", None)
    else:
        config.kv_sharing_modes = modes


def keeps_placeholders(config: Any, missing: Sequence[int]) -> bool:
    """Whether a cache made from a config has placeholders at the given layers."""
    cache = DynamicCache(config=config)
    placeholders = [i for i, layer in enumerate(cache.layers) if type(layer).__name__ == "DummyLayer"]
    return set(missing) <= set(placeholders)


def _compact(config: Any, layers: Sequence[Any], after: Sublayers) -> Callable[[], None]:
    """Number the attentions that are left from 0, where all are of one kind."""
    kept = [i for i in range(after.count) if i not in after.without_attention]
    attentions = [layers[i].get_submodule(after.attention[0]) for i in kept]
    numbers = [getattr(module, "layer_idx", None) for module in attentions]
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if len(kinds) > 1 or None in numbers:
        raise CheckpointError(
            f"the cache of a {config.model_type} keeps no placeholders for layers without attention here, and its "
            f"layers are of several kinds ({', '.join(sorted(kinds))}), so decoding would go wrong; use transformers "
            "5.23 or newer, or keep all attentions"
        )
    for number, module in enumerate(attentions):
        module.layer_idx = number

    def restore() -> None:
        for number, module in zip(numbers, attentions, strict=True):
            module.layer_idx = number

    return restore
