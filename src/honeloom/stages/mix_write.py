"""Writing a mixture: tensors stream from their models to the result, and an interrupted attempt is continued."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.load import load_config
from honeloom.checkpoint.dtypes import format_name
from honeloom.checkpoint.folders import copy_tokenizer, read_config, tokenizer_files
from honeloom.checkpoint.headers import DTYPE_BITS
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import Progress, TensorStream, write_checkpoint
from honeloom.config.load import dump_yaml
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.merging.engine.sources import ModelSource
from honeloom.mixture.config import MixConfig
from honeloom.mixture.layout import SHARED_WIDTH, Entry, Names, mixtral, mixture, models, qwen_moe
from honeloom.mixture.own_format import mixture_config, models_config
from honeloom.mixture.standard import standard_config
from honeloom.runs.atomic import require_space, write_bytes
from honeloom.runs.journal import Journal, read_journal
from honeloom.runs.redact import redact
from honeloom.stages.mix_inputs import Design, Parts, encoder_config, main_dtype, trunk_of, weights_of, written_dtype
from honeloom.stages.mix_router import Gates
from honeloom.stages.work import Work, resolved_settings
from honeloom.system import copy_file, cores, give_back_memory, resident_bytes

__all__ = ["bytes_read", "lay_out", "patch_gates", "write_small_files", "write_tensors_of"]

CHUNK = 1 << 22
_LEAST = 1 << 16
_BYTES = 8 + 4 + 4
"""Of one element on its way: float64, what it becomes, and what is written."""
_SMALL, _SLACK = 64 << 20, 256 << 20
_JOURNAL = "mix.journal"


def lay_out(config: MixConfig, parts: Parts, design: Design, gates: Gates) -> list[Entry]:
    """Every tensor of the result, and where it comes from."""
    if config.whole_models:
        return _side_by_side(parts, design, gates)
    trunk = trunk_of(parts, config)
    shared = None
    if parts.shared is not None:
        shared = {name: parts.shared.info(name).shape for name in trunk.tensors}
    if design.format == "mixtral":
        return mixtral(trunk, gates.shapes)
    if design.standard:
        return qwen_moe(trunk, gates.shapes, shared=shared, two=design.format == "qwen2_moe")
    return mixture(trunk, gates.shapes, shared=shared)


def _side_by_side(parts: Parts, design: Design, gates: Gates) -> list[Entry]:
    def described(source: ModelSource) -> tuple[Names, dict[str, tuple[int, ...]]]:
        return Names(source.architecture), {name: source.info(name).shape for name in weights_of(source)}

    assert parts.encoder is not None  # whole models have one
    own = None if encoder_index(parts) is not None else described(parts.encoder)
    return models([described(source) for source in parts.experts], own, design.layer, gates.shapes)


def encoder_index(parts: Parts) -> int | None:
    """The expert that is the encoder; None if it is a model of its own."""
    return next((e for e, source in enumerate(parts.experts) if source is parts.encoder), None)


def entry_dtype(entry: Entry, parts: Parts, design: Design) -> torch.dtype:
    """The type that a tensor is written in."""
    if entry.origin == "gate":
        return main_dtype(parts.trunk, design.dtype) if design.standard else torch.float32
    if entry.origin == "zeros":
        return main_dtype(parts.trunk, design.dtype)
    if design.format == "honeloom_models":
        return written_dtype(parts.source(entry.origin), entry.tensor, design.dtype)
    return written_dtype(parts.trunk, entry.tensor, design.dtype)  # experts take the type of the trunk


def bytes_read(entries: Sequence[Entry], parts: Parts) -> int:
    """Bytes of the models' tensors that the result is made of; one that serves twice counts twice."""
    found = [(e, parts.source(e.origin).info(e.tensor).dtype) for e in entries if e.origin not in ("gate", "zeros")]
    return sum(entry.elements * DTYPE_BITS[dtype] // 8 for entry, dtype in found)


def write_tensors_of(
    work: Work[MixConfig], parts: Parts, design: Design, entries: Sequence[Entry], gates: Gates
) -> int:
    """Write the tensors, going on where an interrupted attempt stopped; returns the bytes of the files."""
    threads, chunk = _crew(work.config)
    streams = [_stream(entry, parts, entry_dtype(entry, parts, design), gates, chunk) for entry in entries]
    present = sum(p.stat().st_size for p in work.dir.glob("*.safetensors")) if work.resumed else 0
    require_space(work.dir, max(0, sum(s.nbytes for s in streams) - present) + _SMALL)
    journal, finished = work.dir / _JOURNAL, dict[str, None]()
    if work.resumed:
        for entry in read_journal(journal):
            finished.update(dict.fromkeys(entry.get("tensors", ())))
            for name in entry.get("forgotten", ()):
                finished.pop(name, None)
    else:
        journal.unlink(missing_ok=True)
    if finished:
        work.log.say(f"mix: {len(finished)} of {len(streams)} tensors were written before")
    bar = work.log.console.progress("write tensors", len(streams))
    with Journal(journal) as record, bar as advance, one_thread(torch.device("cpu")):
        advance(len(finished))
        progress = Progress(
            tuple(finished), lambda name: advance(1), lambda names: record.append({"tensors": list(names)}),
            lambda names: record.append({"forgotten": list(names)}),
        )  # fmt: skip
        started = time.monotonic()
        size = write_checkpoint(work.dir, streams, threads=threads, progress=progress)
        work.log.event("written", took=round(time.monotonic() - started, 3), threads=threads)
    journal.unlink()
    give_back_memory()
    return size


def _crew(config: MixConfig) -> tuple[int, int]:
    """Threads, and elements of a piece, that stay within the budget."""
    threads = config.threads or cores()
    if config.max_memory is None:
        return threads, CHUNK
    room = config.max_memory - resident_bytes() - _SLACK
    for crew in range(threads, 0, -1):
        chunk = min(CHUNK, room // (crew * _BYTES))
        if chunk >= _LEAST:
            return crew, chunk
    least = resident_bytes() + _SLACK + _LEAST * _BYTES
    raise ConfigError(f"max_memory {config.max_memory:,}: writing a mixture takes at least {least:,} bytes; raise it")


def _stream(entry: Entry, parts: Parts, dtype: torch.dtype, gates: Gates, chunk: int) -> TensorStream:
    if entry.origin == "gate":
        key, _, name = entry.tensor.partition("/")
        return TensorStream.of(entry.name, gates.by_key[key].tensors[name].to(dtype).contiguous())
    if entry.origin == "zeros":
        return TensorStream(entry.name, dtype, entry.shape, partial(_zeros, entry.elements, dtype, chunk))
    source = parts.source(entry.origin)
    as_is = entry.scale == 1.0 and source.is_stored(entry.tensor)
    if as_is and source.info(entry.tensor).dtype == format_name(dtype):
        return TensorStream(entry.name, dtype, entry.shape, lambda: (), lambda: source.place(entry.tensor))
    return TensorStream(entry.name, dtype, entry.shape, partial(_pieces, source, entry, dtype, chunk))


def _zeros(count: int, dtype: torch.dtype, chunk: int) -> Iterator[torch.Tensor]:
    for start in range(0, count, chunk):
        yield torch.zeros(min(chunk, count - start), dtype=dtype)


def _pieces(source: ModelSource, entry: Entry, dtype: torch.dtype, chunk: int) -> Iterator[torch.Tensor]:
    for start in range(0, entry.elements, chunk):
        values = source.read(entry.tensor, start, min(start + chunk, entry.elements)).mul_(entry.scale).to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise NotFiniteError(
                f"{source.name}: {entry.tensor!r} holds values that {format_name(dtype)} cannot; set dtype: bf16 or "
                "fp32"
            )
        yield values


def patch_gates(work: Work[MixConfig], entries: Sequence[Entry], gates: Gates) -> None:
    """Put other values in the place of the gates that are written."""
    with Checkpoint.open(work.dir) as written:
        places = [(written.place(e.name), written.info(e.name).dtype, e.tensor) for e in entries if e.origin == "gate"]
    for (path, offset), dtype, tensor in places:
        key, _, name = tensor.partition("/")
        values = gates.by_key[key].tensors[name]
        kind = next(k for k in (torch.float32, torch.bfloat16, torch.float16) if format_name(k) == dtype)
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(values.to(kind).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())


def write_small_files(work: Work[MixConfig], parts: Parts, design: Design, gates: Gates) -> None:
    """config.json, generation_config.json, tokenizers, and the settings as mix.yaml."""
    reader = parts.encoder or parts.trunk
    copy_tokenizer(reader.tokenizer_folder, work.dir)
    document = _config(work.config, parts, design, gates)
    if work.config.whole_models:
        for name, source in zip(design.names, parts.experts, strict=True):
            _copy_into(source, work, name)
        if encoder_index(parts) is None:
            _copy_into(reader, work, "encoder")
    write_bytes(work.dir / "config.json", _json(document))
    generation = parts.trunk.folder / "generation_config.json"
    if generation.is_file():
        copy_file(generation, work.dir / generation.name)
    write_bytes(work.dir / "mix.yaml", redact(dump_yaml(resolved_settings(work))).encode())


def _copy_into(source: ModelSource, work: Work[MixConfig], name: str) -> None:
    if tokenizer_files(source.tokenizer_folder):
        folder = work.dir / "tokenizers" / name
        folder.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(source.tokenizer_folder, folder)


def _config(config: MixConfig, parts: Parts, design: Design, gates: Gates) -> dict[str, Any]:
    def dtype_of(source: ModelSource) -> str:
        return str(main_dtype(source, design.dtype)).removeprefix("torch.")

    if design.standard:
        shared = parts.shared
        trunk = load_config(parts.trunk.folder).to_dict()
        width = load_config(shared.folder).to_dict()["intermediate_size"] if shared is not None else SHARED_WIDTH
        tied = bool(trunk.get("tie_word_embeddings")) and parts.trunk.tied
        return standard_config(
            design.format, {**trunk, "tie_word_embeddings": tied}, experts=len(parts.experts), top_k=design.top_k,
            dense=config.dense_layers, dtype=dtype_of(parts.trunk), shared_width=width,
        )  # fmt: skip
    if not config.whole_models:
        return mixture_config(
            read_config(parts.trunk.folder), level=config.level, experts=design.names, top_k=design.top_k,
            dense=config.dense_layers, shared=parts.shared is not None,
            router={**gates.spec, "input": config.input}, tied=parts.trunk.tied, dtype=dtype_of(parts.trunk),
        )  # fmt: skip
    index = encoder_index(parts)
    reader = parts.encoder or parts.trunk
    tokens = bool(tokenizer_files(reader.tokenizer_folder))
    folder = "tokenizers/encoder" if index is None else f"tokenizers/{design.names[index]}"
    described = [
        (name, read_config(source.folder), bool(tokenizer_files(source.tokenizer_folder)))
        for name, source in zip(design.names, parts.experts, strict=True)
    ]
    return models_config(
        described, encoder_config(parts, design.layer), encoder_is=index,
        encoder_tokenizer=folder if tokens else None, router=gates.spec, layer=design.layer,
        dtypes=[dtype_of(source) for source in parts.experts], encoder_dtype=dtype_of(reader),
    )  # fmt: skip


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
