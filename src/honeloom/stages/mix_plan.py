"""What `mix --dry-run` says: format, sizes, bytes, what loads the result; from headers and small files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honeloom.checkpoint.architectures import Architecture, architecture_of, layer_count
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.headers import DTYPE_BITS, TensorInfo, read_header
from honeloom.errors import HoneloomError
from honeloom.mixture.config import MixConfig
from honeloom.mixture.layout import Entry, Names, Trunk, active_elements, mixtral, mixture, models, qwen_moe
from honeloom.mixture.mergekit_moe import differences
from honeloom.mixture.parameters import parameters
from honeloom.mixture.standard import choose_format
from honeloom.stages.inputs import ResolvedInput

__all__ = ["mix_notes", "runtime_notes"]

_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
_RUNTIMES = {
    "mixtral": "loads in transformers, vLLM and, once converted, llama.cpp",
    "qwen2_moe": "loads in transformers, vLLM and, once converted, llama.cpp",
    "qwen3_moe": "loads in transformers, vLLM and, once converted, llama.cpp",
    "honeloom_mixture": "loads in honeloom alone: load_model, evaluate, and the Auto classes after `import honeloom`",
    "honeloom_models": "loads in honeloom alone; evaluate routes every row and reads it by the chosen model's "
    "tokenizer",
}


def runtime_notes(format_: str, experts: int, dense: int, *, shared: bool) -> Iterator[str]:
    """What loads the result, and what it costs there."""
    yield _RUNTIMES[format_]
    standard = not format_.startswith("honeloom")
    if standard and experts & (experts - 1):
        yield f"{experts} experts are no power of two: llama.cpp and kernels made for 2, 4, 8, ... may refuse them"
    if format_ == "mixtral" and dense:
        yield (
            f"a Mixtral has no dense layers: the first {dense} hold {experts} equal experts each, exact but {experts} "
            "times as large; format: honeloom stores them once"
        )
    if format_ == "qwen2_moe" and not shared:
        yield "a Qwen 2 MoE has a shared expert: it is one of zeros, which adds nothing"


@dataclass(frozen=True, slots=True)
class _Model:
    """What the files say without their weights."""

    config: dict[str, Any]
    architecture: Architecture
    tensors: dict[str, TensorInfo]

    @classmethod
    def read(cls, found: ResolvedInput) -> _Model:
        folder = found.base or found.paths[0]
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
        tensors = {t.name: t for file in files for t in read_header(Path(file)).tensors}
        config = read_config(folder)
        known = architecture_of(config, tensors)
        return cls(config, known, {name: tensors[name] for name in parameters(tensors, config, known)})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def mix_notes(config: MixConfig, inputs: Mapping[str, ResolvedInput]) -> tuple[str, ...]:
    """Lines for a person; what is not on this machine yet is left out.

    Parameters
    ----------
    config : MixConfig
        The mix.
    inputs : mapping
        Its inputs by place.
    """
    lines = differences(config)
    lines.append(
        f"level {config.level}: {len(config.experts)} experts ({', '.join(config.names)}), top {config.chosen}, "
        f"router {config.router.type} of every {config.input}"
    )
    found = [i for i in inputs.values() if i.kind == "model"]
    if any(not i.paths for i in found):
        return tuple(lines)
    try:
        lines += _size_lines(config, {place: _Model.read(i) for place, i in inputs.items() if i.kind == "model"})
    except HoneloomError as error:
        lines.append(f"cannot be mixed: {error}")
    return tuple(lines)


def _size_lines(config: MixConfig, opened: Mapping[str, _Model]) -> Iterator[str]:
    experts = [opened[f"experts.{i}.model"] for i in range(len(config.experts))]
    trunk, shared = opened.get("base_model", experts[0]), opened.get("shared_expert")
    format_, reason = _format(config, trunk, shared)
    yield f"format: {format_}" + (f" ({reason})" if reason else "")
    yield from runtime_notes(format_, len(experts), config.dense_layers, shared=shared is not None)
    if not config.whole_models:
        yield from _differing(trunk, {f"experts.{i}": e for i, e in enumerate(experts)})
    entries = _entries(config, format_, trunk, experts, shared, opened.get("encoder", trunk))
    total, active = sum(e.elements for e in entries), active_elements(entries, config.chosen, len(experts))
    yield f"parameters: {total:,}, of which a token uses {active:,}"
    sources = {f"experts.{i}": e for i, e in enumerate(experts)}
    sources |= {"trunk": trunk, "shared": shared or trunk, "encoder": opened.get("encoder", trunk)}
    reads = sum(e.elements * _bits(sources[e.origin], e) // 8 for e in entries if e.origin in sources)
    bits = _BITS.get(config.dtype)
    written = [(e, bits or _bits(sources.get(e.origin, trunk), e)) for e in entries]
    writes = sum(e.elements * b // 8 for e, b in written)
    yield f"reads {reads:,} bytes of {len(opened)} models, writes about {writes:,}"


def _bits(model: _Model, entry: Entry) -> int:
    info = model.tensors.get(entry.tensor)
    return DTYPE_BITS[info.dtype] if info is not None else 32


def _format(config: MixConfig, trunk: _Model, shared: _Model | None) -> tuple[str, str]:
    if config.whole_models:
        return "honeloom_models", "whole models side by side"
    linear = config.gate == "linear" and getattr(config.router, "kind", "linear") == "linear"
    format_, reason = choose_format(
        config.format, trunk.config, level=config.level, token=config.input == "token", linear=linear,
        shared=shared is not None,
    )  # fmt: skip
    return ("honeloom_mixture" if format_ == "honeloom" else format_), reason


def _differing(trunk: _Model, experts: Mapping[str, _Model]) -> Iterator[str]:
    for name, model in experts.items():
        odd = next((t for t, s in trunk.shapes.items() if t in model.tensors and model.shapes[t] != s), None)
        if odd is not None:
            yield (
                f"will be refused: {odd!r} is {trunk.shapes[odd]} in the base and {model.shapes[odd]} in {name}; "
                "level: model takes models of any shape"
            )


def _entries(
    config: MixConfig, format_: str, trunk: _Model, experts: list[_Model], shared: _Model | None, encoder: _Model
) -> list[Entry]:
    reader = encoder if config.whole_models else trunk
    width = reader.shapes[next(n for n in reader.shapes if n.endswith(_leaf(reader)))][1]
    gate: dict[str, tuple[int, ...]] = {"weight": (len(experts), width)}
    if config.whole_models:
        layers = layer_count(encoder.config)
        layer = max(0, layers // 2 - 1) if config.encoder_layer is None else config.encoder_layer
        own = None if any(encoder is e for e in experts) else (Names(encoder.architecture), encoder.shapes)
        return models([(Names(e.architecture), e.shapes) for e in experts], own, layer, gate)
    base = Trunk(
        Names(trunk.architecture),
        trunk.shapes,
        layer_count(trunk.config),
        config.dense_layers,
        config.level,
        len(experts),
    )
    if format_ == "mixtral":
        return mixtral(base, gate)
    beside = shared.shapes if shared else None
    if format_ != "honeloom_mixture":
        return qwen_moe(base, gate, shared=beside, two=format_ == "qwen2_moe")
    return mixture(base, gate, shared=beside)


def _leaf(model: _Model) -> str:
    return f"{model.architecture.embeddings.rpartition('.')[2]}.weight"
