"""The two models of an extraction: compared, their linear layers found, and what an adapter leaves out measured."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from honeloom.backends.hf.linear_modules import linear_modules
from honeloom.backends.hf.load import load_config
from honeloom.checkpoint.architectures import Architecture
from honeloom.checkpoint.dtypes import FLOAT8_DTYPES, FLOAT_DTYPES
from honeloom.errors import ConfigError, IncompatibleModelsError
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.extract_config import ExtractConfig
from honeloom.stages.work import Work

__all__ = ["Target", "check_models", "choose_targets", "differences", "measure_outside"]

CHUNK = 1 << 20
_FLOATS = FLOAT_DTYPES | FLOAT8_DTYPES
_NO_ARITHMETIC = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
        "initializer_range", "max_position_embeddings", "pad_token_id", "quantization_config", "tie_word_embeddings",
        "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Fields of config.json that may differ without a change of what the weights compute."""


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer: its tensor on disk, its path in the loaded model, and its shape (out, in).

    `transposed` says that the tensor is stored as (in, out).
    """

    tensor: str
    module: str
    shape: tuple[int, int]
    transposed: bool


def check_models(work: Work[ExtractConfig], tuned: ModelSource, base: ModelSource) -> None:
    """Refuse models that have no difference, tensor by tensor; warn where more than weights differs.

    Raises
    ------
    IncompatibleModelsError
        They are one model, or differ in kind, vocabulary, names or shapes.
    """
    if work.inputs["tuned"].fingerprint == work.inputs["base"].fingerprint:
        raise IncompatibleModelsError(
            f"{tuned.name} and {base.name} are the same model, so their difference is zero; give the tuned model first "
            "and the one that it was tuned from second"
        )
    kinds = [source.architecture.model_type for source in (tuned, base)]
    if kinds[0] != kinds[1]:
        raise IncompatibleModelsError(
            f"{tuned.name} is a {kinds[0]} model and {base.name} a {kinds[1]}; only models of one architecture have a "
            "difference"
        )
    if tuned.tied != base.tied:  # then head and embeddings are two tensors in the comparison
        tuned.untie()
        base.untie()
    _check_tensors(tuned, base)
    if fields := _other_fields(tuned, base):
        work.log.warn(
            f"config.json differs in {', '.join(fields)}: an adapter carries weights alone, so on {base.name} it does "
            f"not compute what {tuned.name} does"
        )
    if work.inputs["base"].base is not None:
        work.log.warn(
            f"{base.name} is an adapter, and the result fits only the model that it makes of its base; merge the two "
            "first (honeloom merge), and name the merged folder in adapter_config.json"
        )


def _check_tensors(tuned: ModelSource, base: ModelSource) -> None:
    for name in sorted({*parameters(tuned), *parameters(base)}):
        shapes = [source.tensors[name].shape if name in source.tensors else None for source in (tuned, base)]
        if shapes[0] == shapes[1]:
            continue
        if None in shapes:
            has, lacks = (tuned, base) if shapes[1] is None else (base, tuned)
            raise IncompatibleModelsError(
                f"{has.name} has the tensor {name!r} and {lacks.name} has not, so there is no difference of the two; "
                "were both saved by the same tool?"
            )
        reason = (
            "their vocabularies differ in size; cut or extend one of them first, so that equal rows mean equal tokens"
            if name in tuned.by_token | base.by_token
            else "they are models of different sizes"
        )
        raise IncompatibleModelsError(
            f"{name!r} is {shapes[0]} in {tuned.name} and {shapes[1]} in {base.name}: {reason}"
        )


def _other_fields(tuned: ModelSource, base: ModelSource) -> list[str]:
    one, two = (load_config(source.folder).to_dict() for source in (tuned, base))
    return sorted(key for key in {*one, *two} - _NO_ARITHMETIC if one.get(key) != two.get(key))


def parameters(source: ModelSource) -> list[str]:
    """Names of a model's parameters; buffers, which some tools store too, are none."""
    return [n for n, i in source.tensors.items() if i.dtype in _FLOATS and n.endswith((".weight", ".bias"))]


def choose_targets(targets: str, base: ModelSource) -> list[Target]:
    """Linear layers of the decoder layers, in the order of the base's files.

    Parameters
    ----------
    targets : str
        "all-linear", or a regular expression that the whole module path must match.
    base : ModelSource
        The model.

    Raises
    ------
    ConfigError
        None matches; the message shows what there is.
    """
    linear = linear_modules(base.folder)
    found = []
    for name in parameters(base):
        module = _module_path(name, base.architecture)
        if module in linear:
            rows, columns = base.tensors[name].shape
            turned = linear[module]
            found.append(Target(name, module, (columns, rows) if turned else (rows, columns), turned))
    chosen = [t for t in found if targets == "all-linear" or re.fullmatch(targets, t.module)]
    if not chosen:
        some = ", ".join(t.module for t in found[:3]) or "none"
        raise ConfigError(
            f"--targets {targets!r} matches no linear layer of {base.name}; it must match a whole path, and there are "
            f"{len(found)}: {some}, ... For example '.*\\.(q_proj|v_proj)', or all-linear"
        )
    return chosen


def _module_path(tensor: str, architecture: Architecture) -> str:
    """Path of the module in a decoder layer that a tensor on disk belongs to; "" for any other tensor."""
    for prefix in architecture.disk_layers:
        if tensor.startswith(f"{prefix}.") and tensor.endswith(".weight"):
            return f"{architecture.layers}{tensor.removeprefix(prefix)}".removesuffix(".weight")
    return ""


def differences(tuned: ModelSource, base: ModelSource, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Pieces of a tensor's difference, flat, float64, each with the index of its first element."""
    count = base.tensors[name].elements
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        yield start, tuned.read(name, start, stop).sub_(base.read(name, start, stop))


def measure_outside(tuned: ModelSource, base: ModelSource, inside: Collection[str]) -> dict[str, float]:
    """Squared norm of the difference of everything that an adapter leaves out, by kind.

    Parameters
    ----------
    tuned, base : ModelSource
        The models.
    inside : collection of str
        Tensors that the adapter is for.
    """
    found = dict.fromkeys(("embeddings", "head", "norms", "biases", "other weights"), 0.0)
    for name in parameters(base):
        if name not in inside:
            square = sum(float(piece.square().sum()) for _, piece in differences(tuned, base, name))
            found[_kind(name, base)] += square
    return found


def _kind(name: str, source: ModelSource) -> str:
    if name in source.by_token:
        return "head" if name == f"{source.architecture.disk_head}.weight" else "embeddings"
    if name.endswith(".bias"):
        return "biases"
    return "norms" if len(source.tensors[name].shape) == 1 else "other weights"
