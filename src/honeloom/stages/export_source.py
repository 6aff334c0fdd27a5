"""What `export` is given, looked at before any weight is loaded; and what `export --dry-run` says of it."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from honeloom.checkpoint.architectures import layer_count
from honeloom.checkpoint.export_config import ExportConfig
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.folders import read_config, refuse_quantised
from honeloom.checkpoint.gguf.architectures import FAMILIES
from honeloom.checkpoint.gguf.content import GgufContent, gguf_content, refusal
from honeloom.checkpoint.gguf.quant import retyped, type_bytes
from honeloom.checkpoint.headers import read_header
from honeloom.errors import CheckpointError, ConfigError, HoneloomError, MissingExtraError
from honeloom.planning.disk import SMALL_FILES
from honeloom.stages.export_texts import TEXTS
from honeloom.stages.inputs import ResolvedInput
from honeloom.types.plans import Needs

__all__ = ["ADVICE", "export_needs", "export_notes", "open_export"]

_DROPPED = "honeloom_dropped"
_MIXTURES = ("honeloom_mixture", "honeloom_models")
ADVICE = f"gguf takes {', '.join(FAMILIES)}, each compared with what llama.cpp computes"


def open_export(found: ResolvedInput) -> Path:
    """The folder of a model that may be exported.

    Raises
    ------
    ConfigError, CheckpointError
        An adapter, a mixture of our own kind, quantised weights, or a family that is not written.
    MissingExtraError
        The package `gguf` is not installed.
    """
    folder = found.paths[0]
    if found.base is not None or (folder / "adapter_config.json").is_file():
        base = found.value.rpartition("+")[0] or str(found.base or "BASE")
        raise ConfigError(
            f"{found.value} is an adapter, and a GGUF file holds a whole model; merge it first: honeloom aggregate "
            f"{shlex.quote(str(folder))} --into-base {shlex.quote(base)} --output-dir whole"
        )
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in _MIXTURES:
        raise CheckpointError(
            f"{folder}: a mixture of honeloom's own kind ({kind}), and llama.cpp has no graph for it; mix FFNs into a "
            "plain Mixtral or Qwen MoE (level: ffn, format: mixtral, qwen2_moe or qwen3_moe), and export that"
        )
    stock = config.get("base") or {} if kind == _DROPPED else config
    if stock.get("model_type") not in FAMILIES:
        raise ConfigError(f"{folder}: a {stock.get('model_type')} cannot be exported: {ADVICE}")
    refuse_quantised(folder, "export")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("export --format gguf needs the package gguf: pip install 'honeloom[gguf]'")
    return folder


def export_notes(config: ExportConfig, inputs: Mapping[str, ResolvedInput]) -> tuple[str, ...]:
    """Lines for a person: architecture, size, vocabulary; from headers and small files alone."""
    found = inputs["model"]
    if not found.paths:
        return ()
    try:
        folder = open_export(found)
        described = _describe(folder)
    except HoneloomError as error:
        return (f"would be refused: {error}",)
    if described is None:
        return ("its architecture follows from its weights or from what was dropped, so it is decided while writing",)
    size = sum(type_bytes(t) for t in retyped(described.tensors, config.quant))
    arch, vocabulary = described.keys["general.architecture"], described.keys["tokenizer.ggml.model"]
    return (
        f"model.gguf: architecture {arch}, {config.quant}, {size / 1e6:,.2f} MB of weights, vocabulary {vocabulary}",
        *described.notes,
    )


def export_needs(config: ExportConfig, inputs: Mapping[str, ResolvedInput]) -> Needs | None:
    """Memory and disk: the source in float32 is compared with the file, of which one matrix is in memory at a time."""
    found = inputs["model"]
    if not found.paths:
        return None
    try:
        infos = _tensors(open_export(found))
    except HoneloomError as error:
        return Needs(unknown=str(error))
    elements = sum(prod(t.shape) for t in infos)
    largest = max(prod(t.shape) for t in infos)
    memory = {"weights": 4 * elements, "one matrix": 8 * largest}
    return Needs(
        parameters=elements,
        device="cpu",
        dtype="fp32" if config.dtype == "auto" else config.dtype,
        tokens_per_row=max(len(text.encode()) for text in TEXTS),
        memory={**memory, "total": sum(memory.values())},
        disk_bytes=sum(type_bytes(t) for t in retyped(infos, config.quant)) + SMALL_FILES,
        command=shlex.join(["honeloom", "export", found.value, "OUT", "--quant", config.quant]),
    )


class _NeedsWeightsError(Exception):
    """The answer is in the weights."""


def _describe(folder: Path) -> GgufContent | None:
    """The file of a stock model; None where its weights decide, or of a dropped one, whose blocks are paired first."""
    config = read_config(folder)
    if config.get("model_type") == _DROPPED:
        return None

    def unknown(names: Sequence[str]) -> bool:
        raise _NeedsWeightsError

    blocks = [(True, True)] * layer_count(config)
    try:
        return gguf_content(folder, config, _tensors(folder), blocks, unknown, refusal(str(folder), ADVICE))
    except _NeedsWeightsError:
        return None


def _tensors(folder: Path) -> list[ExportTensor]:
    single = folder / "model.safetensors"
    files: Sequence[Any] = [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    return [ExportTensor(t.name, t.name, t.shape, t.dtype) for file in files for t in read_header(file).tensors]
