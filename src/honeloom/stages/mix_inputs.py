"""What a mixture is made of: models opened by their role, compared as far as they share anything, and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.devices import DTYPES
from honeloom.backends.hf.load import load_config
from honeloom.checkpoint.architectures import layer_count
from honeloom.checkpoint.dtypes import FLOAT_DTYPES, torch_dtype
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.layer_fields import gather_layer_fields
from honeloom.errors import CheckpointError, ConfigError, IncompatibleModelsError
from honeloom.merging.compatibility import check_compatible, compare_tokenizers
from honeloom.merging.engine.sources import ModelSource
from honeloom.mixture.config import MixConfig
from honeloom.mixture.layout import Names, Trunk
from honeloom.mixture.parameters import parameters
from honeloom.mixture.routers import RouterConfig
from honeloom.mixture.standard import choose_format
from honeloom.stages.work import Work

__all__ = [
    "Design", "Parts", "encoder_config", "hidden_size", "main_dtype", "open_parts", "plan_mixture", "trunk_of",
    "weights_of", "written_dtype",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """The opened models.

    Attributes
    ----------
    trunk : ModelSource
        Gives what all share; of whole models the tokenizer and the generation settings at the root.
    experts : tuple of ModelSource
        In the order of the settings; one model may stand twice.
    shared, encoder : ModelSource or None
        The shared expert, and what reads prompts for whole models.
    """

    trunk: ModelSource
    experts: tuple[ModelSource, ...]
    shared: ModelSource | None = None
    encoder: ModelSource | None = None

    def source(self, origin: str) -> ModelSource:
        """The model that an entry of the layout comes from."""
        if origin.startswith("experts."):
            return self.experts[int(origin.partition(".")[2])]
        found = {"trunk": self.trunk, "shared": self.shared, "encoder": self.encoder}[origin]
        assert found is not None  # the layout names only roles that are filled
        return found

    @property
    def distinct(self) -> dict[str, ModelSource]:
        """Each model once by its name, the trunk first."""
        roles = (self.trunk, *self.experts, self.shared, self.encoder)
        return {s.name: s for s in roles if s is not None}


@dataclass(frozen=True, slots=True)
class Design:
    """What will be written.

    Attributes
    ----------
    format : str
        mixtral, qwen2_moe, qwen3_moe, honeloom_mixture or honeloom_models.
    reason : str
        Why it is no standard one; empty if it is.
    names : tuple of str
        Of the experts.
    top_k : int
        Experts at a time.
    dtype : torch.dtype or None
        Of all weights but the gates; None keeps each tensor's.
    layer : int
        The last layer that an encoder reads; of whole models alone.
    """

    format: str
    reason: str
    names: tuple[str, ...]
    top_k: int
    dtype: torch.dtype | None
    layer: int = -1

    @property
    def standard(self) -> bool:
        """Whether other tools load it."""
        return not self.format.startswith("honeloom")


def open_parts(work: Work[MixConfig], stack: ExitStack) -> Parts:
    """Open every model, one that is listed twice once.

    Raises
    ------
    IncompatibleModelsError
        Models that share a trunk differ where they must agree; the message names field and values.
    """
    opened: dict[tuple[Path, Path | None], ModelSource] = {}
    by_place = {}
    for place, found in work.inputs.items():
        if found.kind == "model":
            where = (found.paths[0], found.base)
            if where not in opened:
                opened[where] = stack.enter_context(ModelSource(found.value, *where))
            by_place[place] = opened[where]
    experts = tuple(by_place[f"experts.{i}.model"] for i in range(len(work.config.experts)))
    trunk = by_place.get("base_model", experts[0])
    encoder = by_place.get("encoder", trunk) if work.config.whole_models else None
    parts = Parts(trunk, experts, by_place.get("shared_expert"), encoder)
    _refuse_mixtures(parts)
    if not work.config.whole_models:
        _check_shapes(work, parts)
    return parts


def _refuse_mixtures(parts: Parts) -> None:
    for name, source in parts.distinct.items():
        inner = next((n for n in source.tensors if ".experts." in n), None)
        if inner is not None:
            raise IncompatibleModelsError(
                f"{name} is a mixture of experts itself ({inner!r}); experts are dense models. Merge such models with "
                "`honeloom merge`"
            )


def _check_shapes(work: Work[MixConfig], parts: Parts) -> None:
    """Refuse models whose units do not fit into one trunk."""
    config = work.config
    models = parts.distinct
    configs = {name: load_config(s.folder).to_dict() for name, s in models.items()}
    heads = {name: f"{s.architecture.disk_head}.weight" for name, s in models.items()}
    tensors = {name: {n: s.tensors[n] for n in weights_of(s) if n != heads[name]} for name, s in models.items()}
    folders = {name: s.tokenizer_folder for name, s in models.items()}
    try:
        check_compatible(configs, tensors)
        findings = compare_tokenizers(folders, by_token=False, template_chosen=True)
    except IncompatibleModelsError as error:
        reason = str(error).partition("; ")[0].replace("cannot merge", "cannot mix", 1)
        raise IncompatibleModelsError(
            f"{reason}; at level {config.level} all experts share one trunk and must fit it. level: model with "
            "dense_layers: 0 takes models of any shape and vocabulary"
        ) from None
    for finding in findings:
        work.log.warn(finding.replace("the result carries", "the mixture carries"))
    count = layer_count(parts.trunk.config)
    if config.dense_layers >= count:
        raise ConfigError(f"dense_layers {config.dense_layers}: the base has {count} layers, so none would be routed")


def plan_mixture(work: Work[MixConfig], parts: Parts) -> Design:
    """Choose the format.

    Raises
    ------
    ConfigError
        The format that was asked for cannot hold the mixture, or the encoder has too few layers.
    """
    config = work.config
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    if config.whole_models:
        assert parts.encoder is not None  # `open_parts` gives whole models one
        layers = layer_count(parts.encoder.config)
        layer = max(0, layers // 2 - 1) if config.encoder_layer is None else config.encoder_layer
        if layer >= layers:
            raise ConfigError(f"encoder_layer {layer}: {parts.encoder.name} has layers 0 to {layers - 1}")
        return Design("honeloom_models", "whole models side by side", config.names, 1, dtype, layer)
    linear = config.gate == "linear" and getattr(config.router, "kind", RouterConfig.kind) == "linear"
    format_, reason = choose_format(
        config.format, load_config(parts.trunk.folder).to_dict(), level=config.level, token=config.input == "token",
        linear=linear, shared=parts.shared is not None,
    )  # fmt: skip
    if format_ == "honeloom":
        known = parts.trunk.architecture
        if known.layers != known.disk_layers[0]:
            raise CheckpointError(
                f"{parts.trunk.name}: a {known.model_type} cannot be the trunk of a mixture, for its files name layers "
                "otherwise than transformers does; take level: model, or the text model alone"
            )
        format_ = "honeloom_mixture"
    return Design(format_, reason, config.names, config.chosen, dtype)


def trunk_of(parts: Parts, config: MixConfig) -> Trunk:
    """The base's names and shapes, for the layout."""
    source = parts.trunk
    shapes = {name: source.tensors[name].shape for name in weights_of(source)}
    names = Names(source.architecture)
    count = layer_count(source.config)
    return Trunk(names, shapes, count, config.dense_layers, config.level, len(parts.experts))


def weights_of(source: ModelSource) -> list[str]:
    """Names on disk of a model's weights."""
    return parameters(source.tensors, source.config, source.architecture)


def hidden_size(config: Mapping[str, Any]) -> int:
    """Width of the stream, from the content of config.json."""
    text = config.get("text_config") or config
    size = text.get("hidden_size") or text.get("n_embd")
    if not isinstance(size, int):
        raise CheckpointError("config.json names no width (hidden_size or n_embd)")
    return size


def written_dtype(source: ModelSource, tensor: str, dtype: torch.dtype | None) -> torch.dtype:
    """Of a tensor in the result: what was asked for, else as it is stored, else what the model computes in."""
    if dtype is not None:
        return dtype
    stored = source.info(tensor).dtype
    return torch_dtype(stored) if stored in FLOAT_DTYPES else config_dtype(source)


def config_dtype(source: ModelSource) -> torch.dtype:
    """The type that a model's config says it computes in."""
    name = str(source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{source.name}: config.json says dtype {name!r}; set dtype: bf16, fp16 or fp32")
    return found


def main_dtype(source: ModelSource, dtype: torch.dtype | None) -> torch.dtype:
    """The type of most of a model's weights in the result, which config.json names."""
    sizes: dict[torch.dtype, int] = {}
    for name in weights_of(source):
        kind = written_dtype(source, name, dtype)
        sizes[kind] = sizes.get(kind, 0) + source.info(name).elements
    return max(sizes, key=lambda kind: sizes[kind])


def encoder_config(parts: Parts, layer: int) -> dict[str, Any]:
    """Content of the encoder's config.json with the layers alone that are read."""
    assert parts.encoder is not None  # of whole models alone
    config = read_config(parts.encoder.folder)
    return {**config, **gather_layer_fields(config, [(config, i) for i in range(layer + 1)])}
