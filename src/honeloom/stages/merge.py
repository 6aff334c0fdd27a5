"""`merge`: models of one architecture in, one model out, reloaded and recomputed in samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.devices import DTYPES
from honeloom.backends.hf.compare import finite_logits, probe_ids
from honeloom.backends.hf.load import Loading, load_config, load_model, load_tokenizer
from honeloom.checkpoint.folders import copy_config, copy_tokenizer
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream, write_checkpoint
from honeloom.config.load import dump_yaml
from honeloom.errors import IncompatibleModelsError
from honeloom.merging.compatibility import check_compatible, compare_tokenizers
from honeloom.merging.config import MergeConfig
from honeloom.merging.recompute import recomputation_error
from honeloom.merging.sources import ModelSource
from honeloom.merging.streaming import Merger
from honeloom.runs.atomic import require_space, write_bytes
from honeloom.runs.redact import redact
from honeloom.stages.work import Outcome, Work
from honeloom.types.report import Check

__all__ = ["execute", "verify_merged", "warn_of_loss", "write_streams"]

_NOTABLE_LOSS = 0.05
_ROOM_FOR_SMALL_FILES = 64 << 20


def execute(work: Work[MergeConfig]) -> Outcome:
    """Run a merge."""
    config = work.config
    with ExitStack() as stack:
        sources = _open_sources(work, stack)
        _check_sources(work, sources)
        merger = _plan(config, sources)
        streams = merger.streams()
        require_space(work.dir, sum(s.nbytes for s in streams) + _ROOM_FOR_SMALL_FILES)
        work.log.say(f"merge: {config.method.type} of {len(merger.models)} models, {len(streams)} tensors")
        written = write_streams(work, streams)
        details = {
            "method": config.method.type,
            "donor": merger.donor.name,
            "lost_delta_fraction": merger.lost_delta_fraction,
            "bytes_read": sum(s.bytes_read for s in dict.fromkeys(sources.values())),
            "bytes_written": written,
        }
        _write_small_files(work, merger.donor)
        warn_of_loss(work, merger)
        checks = verify_merged(work, merger, allow_nan=config.allow_nan)
    return Outcome("model", checks=checks, details=details, relation="merge")


def _open_sources(work: Work[MergeConfig], stack: ExitStack) -> dict[str, ModelSource]:
    """Open every input by its place in the config; a model that is listed twice is opened once."""
    opened: dict[Path, ModelSource] = {}
    for found in work.inputs.values():
        folder = found.paths[0]
        if folder not in opened:
            source = ModelSource(found.value, folder, found.base, allow_nan=work.config.allow_nan)
            opened[folder] = stack.enter_context(source)
    return {place: opened[found.paths[0]] for place, found in work.inputs.items()}


def _check_sources(work: Work[MergeConfig], sources: dict[str, ModelSource]) -> None:
    """Refuse models that do not fit, before their weights are read; say where tokenizers differ."""
    donor = _donor(sources)
    ordered = {s.name: s for s in (donor, *sources.values())}
    configs = {name: load_config(s.folder).to_dict() for name, s in ordered.items()}
    check_compatible(configs, {name: s.tensors for name, s in ordered.items()})
    for finding in compare_tokenizers({name: s.tokenizer_folder for name, s in ordered.items()}):
        work.log.warn(finding)


def _donor(sources: dict[str, ModelSource]) -> ModelSource:
    return sources.get("base_model") or sources["models.0.model"]


def _plan(config: MergeConfig, sources: dict[str, ModelSource]) -> Merger:
    base = sources.get("base_model")
    models = [sources[f"models.{i}.model"] for i in range(len(config.models))]
    weights = [source.weight for source in config.models]
    if config.method.type == "slerp":
        models = [*([base] if base else []), *(m for m in models if m is not base)]
        if len(models) != 2:
            raise IncompatibleModelsError("slerp: both ends are the same model; give two different ones")
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    return Merger(config.method, models, weights, base, _donor(sources), dtype, config.allow_nan)


def write_streams(work: Work[Any], streams: list[TensorStream]) -> int:
    """Write the tensors of a model as they are computed, with progress; returns the bytes written."""
    with work.log.console.progress("merge tensors", len(streams)) as advance:
        counted = [replace(s, chunks=partial(_then, s.chunks, partial(advance, 1))) for s in streams]
        return write_checkpoint(work.dir, counted)


def _then(chunks: Callable[[], Iterable[torch.Tensor]], done: Callable[[], None]) -> Iterator[torch.Tensor]:
    yield from chunks()
    done()


def _write_small_files(work: Work[MergeConfig], donor: ModelSource) -> None:
    config = work.config
    changes = {} if config.dtype == "auto" else {"dtype": str(DTYPES[config.dtype]).removeprefix("torch.")}
    copy_config(donor.folder, work.dir, **changes)
    copy_tokenizer(donor.tokenizer_folder, work.dir)
    resolved: dict[str, Any] = config.model_dump(mode="json")
    for i, source in enumerate(resolved["models"]):
        source["model"] = work.inputs[f"models.{i}.model"].value
    if "base_model" in work.inputs:
        resolved["base_model"] = work.inputs["base_model"].value
    write_bytes(work.dir / "merge.yaml", redact(dump_yaml(resolved)).encode())


def warn_of_loss(work: Work[Any], merger: Merger) -> None:
    """Say if the output type rounds much of the change away; known once all tensors are written."""
    share = merger.lost_delta_fraction
    if share > _NOTABLE_LOSS:
        work.log.warn(
            f"{share:.0%} of the weights change by less than the output type can express and stay the base's; "
            "dtype: fp32 keeps them"
        )


def verify_merged(work: Work[Any], merger: Merger, *, allow_nan: bool = False) -> tuple[Check, ...]:
    """Load what was written in transformers, and recompute samples of it from the inputs."""
    config = work.config
    tokenizer = load_tokenizer(work.dir)
    model = load_model(work.dir, loading=Loading(config.device))
    finite = finite_logits(model, probe_ids(tokenizer, model.config, config.seed))
    probes = "two sentences" if tokenizer else "seeded token ids (no tokenizer)"
    with Checkpoint.open(work.dir) as written:
        error = recomputation_error(merger, written, seed=config.seed)
    return (
        Check(
            f"transformers loads the result and its logits on {probes} are finite",
            finite,
            True,
            finite or allow_nan,
        ),
        Check(
            "merged values, recomputed in samples: largest error in units of the last place", error, 0.5, error <= 0.5
        ),
    )
