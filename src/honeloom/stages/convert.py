"""`convert`: pickled weights in, the same tensors in safetensors out, read back and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from honeloom.backends.hf.compare import finite_logits, probe_ids
from honeloom.backends.hf.load import Loading, load_config, load_model, load_tokenizer
from honeloom.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from honeloom.checkpoint.architectures import architecture_of
from honeloom.checkpoint.convert_config import ConvertConfig
from honeloom.checkpoint.dtypes import format_name
from honeloom.checkpoint.folders import copy_config, copy_tokenizer, read_config
from honeloom.checkpoint.pickles import ADAPTER_PICKLE, PickledTensor, PickledWeights, pickled_files
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import Progress, TensorStream, write_checkpoint, write_tensors
from honeloom.errors import CheckpointError
from honeloom.runs.atomic import require_space
from honeloom.stages.work import Outcome, Work
from honeloom.system import copy_file
from honeloom.types.report import Check

__all__ = ["execute"]

CHUNK = 1 << 22
_ROOM_FOR_SMALL_FILES = 64 << 20
_COMPUTED = ".rotary_emb.inv_freq"
"""Tables that old versions stored and every loader computes."""


def execute(work: Work[ConvertConfig]) -> Outcome:
    """Run a conversion."""
    folder = work.model("source")
    files = pickled_files(folder)
    is_adapter = files[0].name == ADAPTER_PICKLE
    if not is_adapter:
        load_config(folder)  # refuses what could not be loaded in the end
    weights = PickledWeights(files)
    tied = [] if is_adapter else _tied(work, folder, weights)
    computed = [name for name in weights.tensors if name.endswith(_COMPUTED)]
    kept = [tensor for name, tensor in weights.tensors.items() if name not in {*tied, *computed}]
    work.log.say(f"convert: {len(kept)} tensors of {', '.join(file.name for file in files[:4])}")
    size = _write(work, weights, kept, is_adapter)
    checks = [_check_equal(work, weights, kept, is_adapter)]
    del weights
    if is_adapter:
        copy_file(folder / ADAPTER_CONFIG, work.dir / ADAPTER_CONFIG)
    else:
        copy_config(folder, work.dir)
    copy_tokenizer(folder, work.dir)
    if not is_adapter:
        checks.append(_check_loads(work))
    details = {
        "files": [file.name for file in files],
        "tensors": len(kept),
        "tied": tied,
        "left_out": computed,
        "bytes_written": size,
    }
    return Outcome("adapter" if is_adapter else "model", ".", (), tuple(checks), details)


def _tied(work: Work[ConvertConfig], folder: Path, weights: PickledWeights) -> list[str]:
    """The head, where it is a copy of embeddings that it is tied to: loaders make it from them."""
    config = read_config(folder)
    try:
        known = architecture_of(config, weights.tensors)
    except CheckpointError:  # a family that is not known keeps everything
        return []
    text = config.get("text_config") or {}
    tie = config.get("tie_word_embeddings", text.get("tie_word_embeddings", known.tied))
    leaf = f"{known.embeddings.rpartition('.')[2]}.weight"
    embeddings = next((name for name in weights.tensors if name.endswith(leaf)), None)
    head = f"{known.disk_head}.weight"
    if not tie or embeddings is None or head not in weights.tensors:
        return []
    if torch.equal(weights.read(head), weights.read(embeddings)):
        return [head]
    work.log.warn(
        f"config.json ties {head!r} to {embeddings!r}, and their values differ; both are kept, as they were. Set "
        "tie_word_embeddings: false in config.json if the head is one of its own"
    )
    return []


def _write(work: Work[ConvertConfig], weights: PickledWeights, kept: Sequence[PickledTensor], is_adapter: bool) -> int:
    """Write the tensors, file after file of the source; returns the bytes."""
    streams = [TensorStream(t.name, t.dtype, t.shape, partial(_pieces, weights, t)) for t in kept]
    require_space(work.dir, sum(s.nbytes for s in streams) + _ROOM_FOR_SMALL_FILES)
    if is_adapter:
        return write_tensors(work.dir / ADAPTER_WEIGHTS, streams)
    with work.log.console.progress("convert tensors", len(streams)) as advance:
        return write_checkpoint(work.dir, streams, progress=Progress(wrote=lambda name: advance(1)))


def _pieces(weights: PickledWeights, tensor: PickledTensor) -> Iterator[torch.Tensor]:
    flat = weights.read(tensor.name).view(-1)
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK]


def _check_equal(
    work: Work[ConvertConfig], weights: PickledWeights, kept: Sequence[PickledTensor], is_adapter: bool
) -> Check:
    """Every tensor, read back, has the type, shape and bits of the pickle's."""
    files = [work.dir / ADAPTER_WEIGHTS] if is_adapter else None
    with Checkpoint(work.dir, files) if files else Checkpoint.open(work.dir) as written:
        names = set(written.names())
        differing = len(names ^ {t.name for t in kept}) + sum(
            not _equal(written, weights, t) for t in kept if t.name in names
        )
    return Check("tensors that read back other than the pickle holds them", differing, 0, differing == 0)


def _equal(written: Checkpoint, weights: PickledWeights, tensor: PickledTensor) -> bool:
    info, start = written.info(tensor.name), 0
    if (info.dtype, info.shape) != (format_name(tensor.dtype), tensor.shape):
        return False
    for piece in _pieces(weights, tensor):
        back = written.read_slice(tensor.name, start, start + len(piece))
        if not torch.equal(back.view(torch.uint8), piece.view(torch.uint8)):  # bits: NaN is equal to itself
            return False
        start += len(piece)
    return True


def _check_loads(work: Work[ConvertConfig]) -> Check:
    tokenizer = load_tokenizer(work.dir)
    model = load_model(work.dir, loading=Loading.of(work.config))
    finite = finite_logits(model, probe_ids(tokenizer, model.config, work.config.seed))
    probe = "two sentences" if tokenizer else "seeded token ids (no tokenizer)"
    return Check(f"transformers loads the result and its logits on {probe} are finite", finite, True, finite)
