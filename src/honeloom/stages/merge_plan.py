"""What `merge --dry-run` says: donor, tensors, bytes, vocabularies, templates; from headers and small files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.headers import DTYPE_BITS, TensorInfo, read_header
from honeloom.checkpoint.vocabulary import IN_CONFIG, Vocabulary, read_template
from honeloom.errors import HoneloomError
from honeloom.merging.config import MergeMethodConfig
from honeloom.merging.merge_config import MergeConfig
from honeloom.merging.mergekit import differences
from honeloom.merging.parameters import varies
from honeloom.stages.inputs import ResolvedInput

__all__ = ["merge_notes", "mergekit_notes"]

_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


def merge_notes(config: MergeConfig, inputs: Mapping[str, ResolvedInput]) -> tuple[str, ...]:
    """Lines for a person; what is not on this machine yet is left out.

    Parameters
    ----------
    config : MergeConfig
        The merge.
    inputs : mapping
        Its inputs by place.
    """
    lines = list(mergekit_notes(config))
    first = f"{next(place for place, _ in config.sources())}.model"
    donor = inputs.get("base_model") or inputs[first]
    folders = {i.value: _folders(i) for i in inputs.values() if i.kind == "model" and i.paths}
    lines.append(f"donor of configuration, tokenizer, names and types: {donor.value}")
    if donor.value not in folders:
        return tuple(lines)
    try:
        lines += _tensor_lines(config, donor.value, {name: model for name, (model, _) in folders.items()})
        lines += _token_lines(config, donor.value, {name: tokens for name, (_, tokens) in folders.items()})
    except HoneloomError as error:
        lines.append(f"cannot be merged: {error}")
    return tuple(lines)


def mergekit_notes(config: MergeConfig) -> list[str]:
    """Where the result of a file in mergekit's words differs from mergekit's."""
    method = config.method
    if config.source_format != "mergekit" or not isinstance(method, MergeMethodConfig):
        return []
    settings = {name: getattr(method, name) for name in type(method).model_fields if name != "type"}
    values = [*settings.values(), *(v for _, s in config.sources() for v in (s.weight, *s.own().values()))]
    gradients = config.compat != "mergekit" and any(varies(v) and v and isinstance(v[0], float) for v in values)
    weights = config.compat != "mergekit" and len({str(s.weight) for _, s in config.sources()}) > 1
    return differences(method.type, settings, gradients=gradients, weights=weights)


def _folders(found: ResolvedInput) -> tuple[Path, Path]:
    """Where a model's weights lie, and its tokenizer."""
    folder = found.paths[0]
    model = found.base or folder
    return model, folder if Vocabulary.read(folder) is not None else model


def _tensors(folder: Path) -> Iterator[TensorInfo]:
    single = folder / "model.safetensors"
    for file in [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors")):
        yield from read_header(file).tensors


def _tensor_lines(config: MergeConfig, donor: str, folders: Mapping[str, Path]) -> Iterator[str]:
    found = {name: list(_tensors(folder)) for name, folder in folders.items()}
    read = sum(t.end - t.start for tensors in found.values() for t in tensors)
    bits = _BITS.get(config.dtype)
    floats = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
    write = sum(t.elements * (bits if bits and t.dtype in floats else DTYPE_BITS[t.dtype]) // 8 for t in found[donor])
    count = "as the slices say" if config.slices else f"{len(found[donor]):,}"
    yield f"tensors of the result: {count}; reads {read:,} bytes of {len(folders)} models"
    if not config.slices:
        yield f"writes about {write:,} bytes"
        yield from _shapes(donor, found, by_token=config.tokenizer is not None)


def _shapes(donor: str, found: Mapping[str, list[TensorInfo]], *, by_token: bool) -> Iterator[str]:
    shapes = {t.name: t.shape for t in found[donor]}
    for name, tensors in found.items():
        odd = next((t for t in tensors if t.name in shapes and t.shape != shapes[t.name]), None)
        if odd is not None and not (by_token and odd.shape[1:] == shapes[odd.name][1:]):
            yield f"will be refused: {odd.name!r} is {shapes[odd.name]} in {donor} and {odd.shape} in {name}"


def _token_lines(config: MergeConfig, donor: str, folders: Mapping[str, Path]) -> Iterator[str]:
    vocabularies = {name: Vocabulary.read(folder) for name, folder in folders.items()}
    known = {name: v for name, v in vocabularies.items() if v is not None}
    if donor not in known:
        yield f"tokenizer: {donor} has none, so the result has none"
        return
    sizes = ", ".join(f"{name} {len(v.tokens):,} tokens" for name, v in known.items())
    source = config.tokenizer.source if config.tokenizer else "the donor's files as they are"
    yield f"vocabulary: {source} ({sizes})"
    roles = ", ".join(f"{role} {known[donor].roles.get(role)!r}" for role in IN_CONFIG)
    yield f"special tokens of {donor}: {roles}; ids in config.json {_ids(folders[donor])}"
    templates = {name: read_template(folders[name]) for name in known}
    having = [name for name, text in templates.items() if text is not None]
    differ = len({text for text in templates.values() if text is not None}) > 1
    chosen = config.chat_template or ("must be chosen, for they differ" if differ else "the donor's")
    yield f"chat template: {chosen} (of {', '.join(having) or 'no model'})"


def _ids(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return "unknown"
    config = read_config(folder)
    return json.dumps({f"{role}_id": config.get(f"{role}_id") for role in IN_CONFIG})
